"""Code of a user's own, named by its Python path: how it is loaded and called, and the verifier of replies."""
