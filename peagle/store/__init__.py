"""Hidden states on the disk or on the Hub. Start reading at ``reader.py``.

writer, reader     samples of a store; manifest (whose they are), index (which there are),
                   shard (the files that hold them), sample (what one is)
hub, hub_files     a store on the Hub, at a hub_address; shard_cache keeps copies of its shards
disk, locks        files that survive a kill, and processes that share them
"""
