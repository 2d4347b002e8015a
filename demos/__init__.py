"""Things to try: the Shapes world with its small trained models, and the demo app."""
