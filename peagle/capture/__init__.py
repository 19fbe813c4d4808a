"""Makes a hidden-state store of prompts and a target. Start reading at ``capture.py``.

prompts            prompt sets; which columns of a data set hold a prompt
work_split         batches of prompts, and which process does which
conversation       one conversation with the target, turn by turn
generate(_vllm)    who writes the answers: transformers or vLLM
answers            answers that are kept in answers.jsonl, or taken from the data
chat               messages and turns as token ids with a loss mask
extract            the target's hidden states of those documents
import_speculators hidden states that speculators captured, instead of all this
identity           whether a folder holds the store of this run
"""
