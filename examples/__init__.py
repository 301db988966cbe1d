"""Scripts a user would recognise. Installed as xtrain.examples, so that `xtrain launch` finds them."""
