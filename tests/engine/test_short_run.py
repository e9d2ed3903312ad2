from hf_accel.engine.short_run import probe_of, short_run
from hf_accel.testing import CountingText, collate_padded, tiny_trainer


def test_a_short_run_leaves_the_examples_as_they_are(tmp_path):  # huggingface/transformers#27333
    def longer(features):
        for feature in features:
            feature["input_ids"].append(2)
            feature.pop("labels").append(2)
        return collate_padded([{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features])

    rows = [{"input_ids": list(row), "labels": list(row)} for row in CountingText(16).rows]
    trainer = tiny_trainer([], tmp_path, remove_unused_columns=False)
    trainer.train_dataset = trainer.eval_dataset = rows
    trainer.data_collator = longer
    short_run(trainer.accel, 1e-3, {"steps": 2.0}, probe=probe_of(trainer.accel, 4))
    assert [row["labels"] for row in rows] == CountingText(16).rows == [row["input_ids"] for row in rows]
