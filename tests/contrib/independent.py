"""What the adapters are compared with: a dense step from jacrev, and the sections of the page."""

import re

import torch

from paths import DOCS

PAGE = (DOCS / "equation-frameworks.md").read_text()


def run_section(heading, capsys):
    """Run a section of the page, check what it prints, and return what it defines."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    (example,) = re.findall(r"^```py\n(.*?)^```", sections[heading], re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile(example, "equation-frameworks.md", "exec"), namespace)
    (expected,) = re.findall(r"^print\(.*\)  # (.*)$", example, re.MULTILINE)
    assert expected in capsys.readouterr().out.splitlines()
    return namespace


def dense_step(residuals, parameters, damping):
    """Return the loss, and the parameters after a step of (J^T J + lam I)^-1 J^T rho.

    residuals maps {name: parameter} to a list of (values, weight); weight * mean square is minimised, and
    lam is `damping` times the mean diagonal of J J^T.
    """

    def scaled(named):
        return torch.cat([(w / r.numel()) ** 0.5 * r.flatten() for r, w in residuals(named)])

    named = {name: p.detach().clone() for name, p in parameters.items()}
    rho = scaled(named)
    jacobian = torch.func.jacrev(scaled)(named)
    j = torch.cat([jacobian[name].reshape(len(rho), -1) for name in named], 1)
    lam = damping * j.square().sum(1).mean()
    d = torch.linalg.solve(j.T @ j + lam * torch.eye(j.shape[1]), j.T @ rho)
    parts = d.split([p.numel() for p in named.values()])
    return float(rho @ rho), {
        name: p - part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)
    }


def assert_at(parameters, expected, rtol=1e-7):
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), expected[name].to(p), rtol=rtol, atol=rtol / 100)


def derivatives(u):
    """Return functions of points (N, d): u, its gradient and its Hessian."""
    return torch.vmap(u), torch.vmap(torch.func.grad(u)), torch.vmap(torch.func.hessian(u))
