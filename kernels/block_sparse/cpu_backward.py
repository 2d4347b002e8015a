"""Backward pass on the CPU: the forward pass's steps once more, each giving its share of all three gradients."""

import torch
from torch import Tensor

from .cpu_plan import Batch, Step
from .cpu_tiles import Tiles, exponentials
from .request import Request


def backward(
    request: Request, out: Tensor, lse: Tensor, out_gradient: Tensor, lse_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtype; the same to the bit in every run.

    out, lse: what `cpu.forward` returned. See `oracle.gradients` for the formulas.
    """
    empty = (lse == -torch.inf)[..., None]
    # Whatever a query holds that sees nothing, it changes nothing: 0 * NaN would.
    tiles = Tiles(
        request.query.masked_fill(empty, 0.0),
        request.key,
        request.value,
        request.mask,
        request.scale,
        key_bias=request.key_bias,
        token_order=request.token_order,
        keep_keys=True,
    )
    out_gradient = out_gradient.masked_fill(empty, 0.0)
    raised = (out_gradient.to(tiles.dtype) * out.to(tiles.dtype)).sum(-1, keepdim=True) - lse_gradient[..., None]
    # Weights are exp(scores - lse): infinity makes them 0 where a query sees no key or does not exist.
    normal = tiles.rows.to_blocks(lse[..., None].masked_fill(empty, torch.inf), tiles.dtype, fill=torch.inf)
    raised = tiles.rows.to_blocks(raised.masked_fill(empty, 0.0), tiles.dtype)
    out_rows = tiles.rows.to_blocks(out_gradient, tiles.dtype)
    query_gradient, key_gradient, value_gradient = (torch.zeros_like(x) for x in (tiles.query, tiles.key, tiles.value))
    small = bool(tiles.small_rows().all())
    for batch in tiles.batches:
        queries = tiles.queries(batch)
        outs, offset, delta = (x.index_select(0, batch.rows) for x in (out_rows, normal, raised))
        sums = torch.empty_like(queries)
        if tiles.dtype == torch.float64:
            offset = _precise_lse(tiles, batch, queries)
        for step in batch.steps:
            some = slice(step.active)
            scores, keys, values = tiles.step(batch, step, queries)
            # What is not seen has score -inf or, as a query, offset inf.
            weights = scores.sub_(offset[some]).exp_() if small else exponentials(scores.sub_(offset[some]), True)
            _add(value_gradient, step, torch.bmm(weights.mT, outs[some]))
            rise = torch.bmm(outs[some], values.mT).sub_(delta[some]).mul_(weights)
            _add(key_gradient, step, torch.bmm(rise.mT, queries[some]))
            if step.first:
                torch.bmm(rise, keys, out=sums)
            else:
                sums[some].baddbmm_(rise, keys)
        query_gradient.index_copy_(0, batch.rows, sums)
    blocks = (
        (tiles.rows, query_gradient.mul_(tiles.scale)),
        (tiles.columns, key_gradient.mul_(tiles.scale)),
        (tiles.columns, value_gradient),
    )
    found = [layout.to_tokens(x, tiles.batch, tiles.heads).to(request.query.dtype) for layout, x in blocks]
    return found[0], found[1], found[2]


def _add(blocks: Tensor, step: Step, found: Tensor) -> None:
    blocks.index_add_(0, step.columns, found.view(-1, *blocks.shape[1:]))


def _precise_lse(tiles: Tiles, batch: Batch, queries: Tensor) -> Tensor:
    """(R, queries, 1): the log-sum-exp in the precision of the tiles, for it comes in float32; inf where it is -inf."""
    lse = torch.full_like(queries[..., :1], -torch.inf)
    for step in batch.steps:
        some = lse[: step.active]
        scores, _, _ = tiles.step(batch, step, queries)
        some.copy_(torch.logaddexp(some, scores.logsumexp(-1, keepdim=True)))
    return lse.masked_fill_(lse == -torch.inf, torch.inf)
