"""What lets a script run with no line changed: the names `deepspeed`, `apex` and `torch.cuda` mean xtrain's.

Nothing here is active because xtrain was imported: `xtrain run`, `xtrain.install()` and `import xtrain.as_deepspeed`
are the ways in. process.py has them; alias.py is about names of packages, device/ about torch.cuda.
"""
