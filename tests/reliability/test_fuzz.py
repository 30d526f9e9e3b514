"""Calls with random arguments, sound and wrong, of every public function of fngd_kernels and of the nodes."""

import fuzz
import pytest
from fuzz_nodes import campaign as node_campaign

CALLS = {False: 1560, True: 100_000}
NODE_CALLS = {False: 200, True: 10_000}


@pytest.mark.filterwarnings("ignore")  # of torch, about what is passed wrongly on purpose
@pytest.mark.parametrize(
    ("campaign", "calls"), [(fuzz.campaign, CALLS), (node_campaign, NODE_CALLS)], ids=["functions", "nodes"]
)
def test_every_call_is_answered_rightly_or_refused(campaign, calls, full, tally):
    outcomes, findings = campaign(calls[full], seed=0)
    assert not findings, "\n".join(findings[:20])
    assert sum(sum(counts.values()) for counts in outcomes.values()) == calls[full]
    for name, counts in outcomes.items():
        # Half of the calls are sound.
        assert counts["right answer"] > 0.3 * sum(counts.values()), name
        for outcome, cases in counts.items():
            tally("Native code", f"{name}: random calls, half of them wrong", outcome, cases)
