"""What you do not need tonight: the experiments, the analyses and the tables of the paper."""
from data import BadInput, positive
from eval import steering_of
from infosteer import METHODS


def machine_flags(add):
    """The flags that all analyses share. add: a parser's add_argument."""
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--threads", type=positive, metavar="N",
        help="threads on a CPU (default: 1 for the toy world's tasks, else PyTorch's)")


def steerings_of(folders, device="cpu"):
    """The steering of each model. Raises BadInput if none acts in the forward pass."""
    found = [steering_of(folder, device) for folder in folders]
    if not any(METHODS[steering.method].change for steering in found):
        raise BadInput("--steered: none of these models was trained with a steering of the forward "
                       "pass (--steer int), so there is none to keep")
    return found
