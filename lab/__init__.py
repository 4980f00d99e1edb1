"""What you do not need tonight: the experiments, the analyses and the tables of the paper."""
from data import positive


def machine_flags(add):
    """The flags that all analyses share. add: a parser's add_argument."""
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--threads", type=positive, metavar="N",
        help="threads on a CPU (default: 1 for the toy world's tasks, else PyTorch's)")
