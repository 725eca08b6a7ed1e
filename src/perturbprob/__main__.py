"""``python -m perturbprob`` is the command ``perturbprob``."""

from perturbprob.cli import app

if __name__ == "__main__":
    app()
