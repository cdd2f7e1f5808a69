"""XLA's options of compiled train steps: those that were measured to help, by platform and chip."""
