"""`python -m bandit_rft` is `bandit-rft`."""

from bandit_rft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
