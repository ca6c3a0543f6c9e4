"""One rank's trouble reaches every rank, as an error that names it; nothing hangs."""

from __future__ import annotations

import pytest

from distributed.failure_cases import (
    Agree,
    Interrupt,
    be_interrupted_while_saving,
    broadcast,
    endings,
    fail_before_gathering,
    fail_to_save,
    fail_to_save_as_process,
    gather,
    gather_something_else,
    gather_soon,
    gather_while_saving,
    go_on_after,
    kill_itself,
    leave,
    save,
    save_when_rank_0_has_had_a_second_to_end,
    stop_itself,
    sum_three,
    sum_two,
    use_after_close,
    vote,
)

FULL = "OSError: [Errno 28] No space left on device"
SECONDS = 3.0


def only(values):
    """Return the one value that all of them are."""
    assert all(value == values[0] for value in values), values
    return values[0]


def placed(rank, one, others, world_size):
    return [one if number == rank else others for number in range(world_size)]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (1, 2), (2, 4)])
def test_an_action_that_fails_on_one_rank_fails_on_all(tmp_path, rank, world_size):
    seen = endings(tmp_path, *placed(rank, fail_to_save, save, world_size))
    own = seen.pop(rank)
    assert (own["error"], own["message"]) == ("OSError", FULL.removeprefix("OSError: "))
    other = only(seen)
    assert other["error"] == "RankError"
    assert other["message"] == f"rank {rank}: save: {FULL}"


def test_of_many_failures_the_lowest_rank_speaks(tmp_path):
    seen = endings(tmp_path, save, fail_to_save, save, fail_to_save)
    other = only([seen[0], seen[2]])
    assert other["message"] == f"rank 1: save: {FULL} (and 1 other rank)"
    assert other["ranks"] == [1, 3]
    assert only([seen[1], seen[3]])["error"] == "OSError"


def test_the_group_goes_on_after_a_failure_that_was_expected(tmp_path):
    seen = endings(tmp_path, go_on_after(save), go_on_after(fail_to_save))
    assert [rank["result"][1] for rank in seen] == [[0, 1], [0, 1]]


def test_an_interrupt_of_one_rank_is_told_to_the_others(tmp_path):
    own, other = endings(tmp_path, be_interrupted_while_saving, save)
    assert own["error"] == "KeyboardInterrupt"
    assert other["message"].startswith("rank 0: save: KeyboardInterrupt")


def test_a_failure_reaches_ranks_that_are_in_a_call_inside_the_action(tmp_path):
    own, other = endings(tmp_path, fail_before_gathering, gather_while_saving)
    assert own["error"] == "OSError"
    assert other["message"] == f"rank 0: save: {FULL}"


def test_every_rank_is_told_which_one_disagrees(tmp_path):
    seen = only(endings(tmp_path, *placed(2, Agree(5), Agree(4), 4)))
    assert seen["error"] == "RankError"
    assert seen["ranks"] == [2]
    assert seen["message"] == ("rank 2: settings: expected 4 (ranks 0, 1, 3), found 5 (rank 2)")


def test_only_the_part_that_disagrees_is_shown(tmp_path):
    acts = [Agree({"model": {"width": width, "depth": 2}, "seed": 1}) for width in (8, 16)]
    seen = only(endings(tmp_path, *acts))
    assert seen["message"] == "rank 1: settings.model.width: expected 8 (rank 0), found 16 (rank 1)"


def test_a_key_that_one_rank_alone_has_is_a_disagreement(tmp_path):
    seen = only(endings(tmp_path, Agree({"seed": 1}), Agree({"seed": 1, "lr": None})))
    assert seen["message"] == 'rank 1: settings: expected {} (rank 0), found {"lr": null} (rank 1)'


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), (None, "null")])
def test_values_that_python_calls_equal_may_disagree(tmp_path, one, other):
    assert only(endings(tmp_path, Agree(one), Agree(other)))["error"] == "RankError"


def test_the_group_goes_on_after_a_disagreement(tmp_path):
    seen = endings(tmp_path, go_on_after(Agree(1)), go_on_after(Agree(2)))
    assert only(seen)["result"][1] == [0, 1]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_is_stopped_is_named_by_all_others_when_time_is_up(tmp_path, rank):
    seen = endings(tmp_path, *placed(rank, stop_itself, gather, 4), timeout=SECONDS)
    assert seen.pop(rank) is None
    other = only(seen)
    assert (other["error"], other["ranks"]) == ("RankTimeoutError", [rank])
    assert other["message"] == f"rank {rank}: no answer within 3 s: gather loss"


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_is_killed_is_named_by_all_others_at_once(tmp_path, rank):
    seen = endings(tmp_path, *placed(rank, kill_itself, gather, 4), timeout=600.0)
    assert seen.pop(rank) is None
    other = only(seen)
    assert (other["error"], other["ranks"]) == ("RankError", [rank])
    assert other["message"] == f"rank {rank}: has ended before gather loss"


def test_a_vote_that_a_rank_did_not_live_to_see_is_called_one_of_all_ranks(tmp_path):
    seen = endings(tmp_path, *placed(1, kill_itself, vote, 2), timeout=600.0)
    assert seen[0]["message"] == "rank 1: has ended before any() of all ranks"


def test_all_ranks_that_do_not_answer_are_named(tmp_path):
    seen = endings(tmp_path, gather, stop_itself, gather, stop_itself, timeout=SECONDS)
    assert only([seen[0], seen[2]])["ranks"] == [1, 3]


def test_a_rank_that_is_killed_is_named_before_time_is_up_for_one_that_is_stopped(tmp_path):
    seen = endings(tmp_path, gather, kill_itself, gather, stop_itself, timeout=600.0)
    assert only([seen[0], seen[2]])["ranks"] == [1]


def test_after_a_timeout_every_call_raises_it_again_at_once(tmp_path):
    acts = (go_on_after(gather), stop_itself)
    seen = endings(tmp_path, *acts, timeout=SECONDS)
    assert seen[0]["message"] == "rank 1: no answer within 3 s: gather loss"
    assert seen[0]["result"] is None


def test_a_call_that_waits_for_less_than_the_timeout_says_for_how_long(tmp_path):
    seen = endings(tmp_path, gather_soon, stop_itself)
    assert (seen[0]["error"], seen[0]["ranks"]) == ("RankTimeoutError", [1])
    assert seen[0]["message"] == "rank 1: no answer within 1 s: gather loss"


def test_a_killed_rank_that_held_the_store_is_known_at_once(tmp_path):
    seen = endings(tmp_path, kill_itself, gather, gather, store_on_rank_0=True)
    for other in seen[1:]:
        assert (other["error"], other["ranks"]) == ("RankError", [0])
        assert other["message"].startswith("rank 0: has ended, and with it the store")


def test_a_stopped_rank_that_holds_the_store_ends_in_a_timeout(tmp_path):
    seen = endings(tmp_path, stop_itself, gather, timeout=SECONDS, store_on_rank_0=True)
    assert (seen[1]["error"], seen[1]["ranks"]) == ("RankTimeoutError", [0])
    assert "no answer within 3 s from the store" in seen[1]["message"]


@pytest.mark.parametrize("store_on_rank_0", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_leaves_is_missed_at_once(tmp_path, rank, store_on_rank_0):
    acts = placed(rank, leave, gather, 2)
    seen = endings(tmp_path, *acts, store_on_rank_0=store_on_rank_0)
    assert seen.pop(rank)["result"] == "left"
    assert seen[0]["error"] == "RankError"
    assert seen[0]["message"] == f"rank {rank}: has left before gather loss"


def test_a_failed_rank_0_keeps_the_store_until_the_others_have_read_why(tmp_path):
    acts = (fail_to_save_as_process, save_when_rank_0_has_had_a_second_to_end)
    own, other = endings(tmp_path, *acts, store_on_rank_0=True)
    assert own["error"] == "OSError"
    assert other["message"] == f"rank 0: save: {FULL}"


@pytest.mark.parametrize(
    ("act", "call"), [(gather_something_else, "gather 'accuracy'"), (broadcast, "broadcast 'run'")]
)
def test_ranks_out_of_step_are_told_both_calls(tmp_path, act, call):
    seen = only(endings(tmp_path, gather, gather, act))
    assert (seen["error"], seen["ranks"]) == ("RankError", [2])
    assert seen["message"] == (
        "rank 2: the ranks are out of step: "
        f"expected gather 'loss' (ranks 0, 1), found {call} (rank 2)"
    )


def test_sums_of_more_values_on_one_rank_are_refused(tmp_path):
    seen = only(endings(tmp_path, sum_two, sum_three))
    assert seen["message"].startswith("rank 1: how many values to sum: expected 2")


def test_a_group_that_was_left_answers_no_more(tmp_path):
    seen = only(endings(tmp_path, use_after_close, use_after_close))
    assert seen["message"] == "group: any() of all ranks: this rank has left the group"


def test_a_rank_that_waits_can_be_interrupted(tmp_path):
    waiting, other = endings(tmp_path, *[Interrupt(tmp_path)] * 2)
    assert waiting["error"] == "KeyboardInterrupt"
    assert other["message"] == "rank 0: has left before gather loss"
