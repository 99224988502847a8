"""`python -m swa_avg` is `swa-avg`, for torchrun and for places without the script."""

from swa_avg.cli import main

if __name__ == "__main__":
    main()
