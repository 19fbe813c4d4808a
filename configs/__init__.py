"""The shipped configurations; this folder is installed as ``peagle.configs``."""
