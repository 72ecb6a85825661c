"""Other people's training code, each kind in a module of its own; `link` imports none of them."""
