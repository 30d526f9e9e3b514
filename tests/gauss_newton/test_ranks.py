"""Ranks that each hold some of the residuals take the step of all residuals together."""

import pytest
import torch
import torch.distributed as dist
from least_squares import dense_step, flat, mlp

import fngd
from ranks import run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


def problem():
    torch.manual_seed(0)
    return mlp(2, 8, 8, 1), torch.randn(20, 2).double(), torch.randn(7, 2).double()


def blocks(model, inside, boundary):
    def residuals():
        x = inside.clone().requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return {"equation": du.sum(1) + u.squeeze(1) ** 2, "boundary": (model(boundary) - 1, 10.0)}

    return residuals


def own_blocks(model, inside, boundary, rank):
    """A third of the points on rank 0, the others on rank 1."""
    parts = [x.tensor_split([len(x) // 3])[rank] for x in (inside, boundary)]
    return blocks(model, *parts)


def check_steps(rank, ranks, folder):
    for solver in ("auto", "iterative"):
        for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
            model, *points = problem()
            expected = dense_step(blocks(model, *points), list(model.parameters()), 0.01)
            loss = sum(w * r.square().mean() for r, w in _weighted(blocks(model, *points)()))
            model.to(dtype)
            before = flat(model.parameters())
            opt = fngd.GaussNewton(
                model, damping=0.01, solver=solver, tolerance=1e-10, process_group=dist.group.WORLD
            )
            found = opt.step(own_blocks(model, *(x.to(dtype) for x in points), rank))
            step = before - flat(model.parameters())
            assert float((step - expected).norm() / expected.norm()) < tolerance
            assert float(found) == pytest.approx(float(loss.detach()), rel=tolerance)
            assert opt.stats()["solver"] == ("parameter" if solver == "auto" else "iterative")
            same_everywhere(model)


def _weighted(found):
    return [block if isinstance(block, tuple) else (block, 1.0) for block in found.values()]


def same_everywhere(model):
    own = flat(model.parameters())
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    assert all(torch.equal(other, own) for other in others)


def check_levenberg_marquardt(rank, ranks, folder):
    """Damping and trials are those of one process with all points."""
    alone, *points = problem()
    one = fngd.GaussNewton(alone, solver="parameter")
    model, _, _ = problem()
    opt = fngd.GaussNewton(model, process_group=dist.group.WORLD)
    for _ in range(8):
        expected = one.step(blocks(alone, *points))
        found = opt.step(own_blocks(model, *points, rank))
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
    same_everywhere(model)
    assert opt.stats()["undone_trials"] == one.stats()["undone_trials"]
    torch.testing.assert_close(flat(model.parameters()), flat(alone.parameters()), rtol=1e-3, atol=1e-5)


def check_refusals(rank, ranks, folder):
    model, inside, _ = problem()
    with pytest.raises(ValueError, match="solver: expected 'auto', 'parameter' or 'iterative'"):
        fngd.GaussNewton(model, solver="sample", process_group=dist.group.WORLD)
    opt = fngd.GaussNewton(model, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="expected the same blocks on all ranks"):
        opt.step(lambda: {f"block of rank {rank}": model(inside)})
    with torch.no_grad():
        model[2].weight += rank
    opt = fngd.GaussNewton(model, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"expected equal parameters on all ranks, 2\.weight differ"):
        opt.step(lambda: model(inside))


def test_ranks(tmp_path):
    run(2, tmp_path, check_steps, check_levenberg_marquardt, check_refusals)
