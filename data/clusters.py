"""Groups of alike vectors: k-means on the sphere, for memories and for tokens (Appendix B)."""
import torch
import torch.nn.functional as F

CENTRE_TOKENS = 16_384                 # tokens among which the centres of like tokens are found


def spherical_kmeans(x, n: int, seed: int = 0, iterations: int = 50):
    """Cluster rows by their cosine: x [rows, d] -> (the group of each row [rows] long, 0..n-1
    without gaps; the centres [n, d]). Fewer rows than n are a group each.

    A row joins the centre with the largest cosine; a centre is the direction of its rows' sum. The
    first centres are drawn as in k-means++, by the distance 1 - cos to the nearest centre so far. A
    group that loses its last row takes the row that fits worst elsewhere."""
    x = F.normalize(x.float(), dim=-1)                                             # [rows, d]
    n, generator = min(n, len(x)), torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(x), (1,), generator=generator).item()]
    distance = 1 - x @ x[chosen[0]]                                                # [rows]
    while len(chosen) < n:
        chance = distance.clamp_min(0).cpu()
        chance[chosen] = 0
        if not chance.sum() > 0:                               # all others are copies of centres
            chance = torch.ones(len(x)).scatter_(0, torch.tensor(chosen), 0.0)
        chosen.append(torch.multinomial(chance, 1, generator=generator).item())
        distance = torch.minimum(distance, 1 - x @ x[chosen[-1]])
    centres, group = x[chosen], None
    for _ in range(iterations):
        cosine, nearest = (x @ centres.T).max(-1)                                  # [rows] each
        for empty in (nearest.bincount(minlength=n) == 0).nonzero()[:, 0].tolist():
            crowded = nearest.bincount(minlength=n)[nearest] > 1
            nearest[torch.where(crowded, cosine, torch.inf).argmin()] = empty
        if group is not None and torch.equal(nearest, group):
            break
        group = nearest
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, group, x), dim=-1)
    return group, centres


def split_groups(groups, patterns, n: int, seed: int = 0):
    """Split each group by which tokens activate its memories: groups [d_m], patterns |k|
    [d_m, tokens] -> finer groups [d_m], 0.. without gaps."""
    finer = groups.clone()
    for group in groups.unique():
        members = groups == group                                              # [d_m]
        finer[members] = group * n + spherical_kmeans(patterns[members], n, seed)[0]
    return finer.unique(return_inverse=True)[1]


def token_groups(decode, n: int, seed: int = 0):
    """Tokens grouped by the cosine of their rows in the LM head: decode [V, d] -> [V] long. In a
    large vocabulary the centres are found among some of the tokens."""
    if n >= len(decode):
        return torch.arange(len(decode), device=decode.device)
    some = torch.randperm(len(decode), generator=torch.Generator().manual_seed(seed))
    _, centres = spherical_kmeans(decode[some[:CENTRE_TOKENS].to(decode.device)], n, seed)
    parts = decode.split(CENTRE_TOKENS)
    return torch.cat([(part.float() @ centres.T).argmax(-1) for part in parts])
