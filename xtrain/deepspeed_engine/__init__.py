"""`"xtrain": {"engine": "deepspeed"}`: training by the installed DeepSpeed, on this repository's backends.

`start.py` hands the call over, `accelerator.py` presents a backend as DeepSpeed's accelerator. Everything else
in xtrain is the native engine's; deepspeed is imported only here, and only when a config asks for it.
"""
