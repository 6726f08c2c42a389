"""`python -m stage_rl` is the command `stage`; torchrun starts it by this name."""

from stage_rl.cli import main

if __name__ == "__main__":
    main()
