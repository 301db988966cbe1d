"""Names only: DeepSpeed's import paths, which links in xtrain/ lead to, and its engine's getters and actions.

Nothing outside of this folder imports from it, but for the files that lie loose in xtrain/. Its folders are imported
by the links (`xtrain.runtime`, not `xtrain.deepspeed_api.runtime`): by both names there would be two of everything.
"""
