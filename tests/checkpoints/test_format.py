import pytest
import torch

from hf_accel.checkpoints import format as ckpt


def write(path, number=0):
    ckpt.mark_incomplete(path)
    ckpt.save_state(path, ckpt.STATE, {"a": {"tensor": torch.arange(5) + number}, "b": [1, "x", torch.ones(2)]})
    (path / "model.bin").write_bytes(b"0" * 100)
    ckpt.mark_complete(path)


def test_states_come_back_as_they_were(tmp_path):
    write(tmp_path)
    state = ckpt.load_state(tmp_path, ckpt.STATE)
    assert torch.equal(state["a"]["tensor"], torch.arange(5)) and state["b"][:2] == [1, "x"]
    assert ckpt.integrity_error(tmp_path) is None


def test_what_is_taken_apart_comes_together_again():
    state = {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.99), "lr": torch.ones(2)}]}
    tensors = {}
    skeleton = ckpt.flatten_state(state, tensors)
    assert set(tensors) == {"/state/0/step", "/groups/0/lr"}
    again = ckpt.unflatten_state(skeleton, tensors)
    assert again["groups"][0]["betas"] == (0.9, 0.99) and list(again["state"]) == [0, 1]
    assert again["state"][0]["step"] is state["state"][0]["step"]


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda p: (p / ckpt.COMPLETE).unlink(), "has no accel_complete.json"),
        (lambda p: (p / ckpt.COMPLETE).write_text("{"), "cannot be read"),
        (lambda p: (p / "model.bin").unlink(), "model.bin is missing"),
        (lambda p: (p / "model.bin").write_bytes(b"0" * 99), "99 bytes instead of 100"),
        (
            lambda p: (p / f"{ckpt.STATE}.json").write_text(p.joinpath(f"{ckpt.STATE}.json").read_text()[::-1]),
            "changed",
        ),
    ],
)
def test_what_is_not_whole_is_passed_over(tmp_path, harm, words):
    for step in (5, 10):
        write(tmp_path / f"checkpoint-{step}")
    harm(tmp_path / "checkpoint-10")
    whole, passed_over = ckpt.newest_complete(tmp_path)
    assert whole.name == "checkpoint-5" and words in passed_over["checkpoint-10"]


def test_a_plain_trainers_checkpoint_counts_as_whole(tmp_path):
    write(tmp_path / "checkpoint-5")
    plain, begun = tmp_path / "checkpoint-10", tmp_path / "checkpoint-15"
    plain.mkdir()
    (plain / "trainer_state.json").write_text("{}")
    ckpt.mark_incomplete(begun)
    (begun / "trainer_state.json").write_text("{}")
    assert ckpt.newest_complete(tmp_path)[0] == plain
    (plain / "trainer_state.json").unlink()
    assert ckpt.newest_complete(tmp_path)[0].name == "checkpoint-5"


def test_truncated_state_is_one_sentence(tmp_path):
    write(tmp_path)
    path = tmp_path / f"{ckpt.STATE}.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ckpt.CheckpointError, match="cannot be read .*Resume from another checkpoint"):
        ckpt.load_state(tmp_path, ckpt.STATE)


def test_what_a_write_that_was_killed_has_left_is_no_part_of_the_next(tmp_path):
    write(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "accel_complete.json.tmp").write_text("{")
    write(tmp_path / "checkpoint-5")
    assert ckpt.integrity_error(tmp_path / "checkpoint-5") is None


def test_tensors_may_share_memory(tmp_path):
    tensor = torch.arange(5)
    ckpt.save_state(tmp_path, ckpt.STATE, {"a": tensor, "b": [tensor, tensor[:2]]})
    state = ckpt.load_state(tmp_path, ckpt.STATE)
    assert torch.equal(state["a"], tensor) and torch.equal(state["b"][1], tensor[:2])
