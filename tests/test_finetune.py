"""finetune.py: what is trained, and what is refused."""

import os

import torch

import finetune
import weights
from lib.cubes import position_table
from model import VideoMAE
from tests.common import (TUNE, call, checkpoint, labelled, mistake, run, saved, test, tmp,
                          tune_data)


@test
def test_what_is_trained():
    """--linear_probe moves the head only; --freeze 2 leaves embedding and 2 blocks as in --init."""
    torch.manual_seed(1)
    source = VideoMAE("tiny", num_frames=4, img_size=16, patch_size=8)
    state = dict(model=source.state_dict(), config=source.config, classes=None, args={})
    shapeless = """--max_steps 2 --batch_size 4 --num_workers 0 --device cpu --dtype fp32
        --sampling_rate 1 --log_every 1""".split()
    base = [*shapeless, "--data", labelled()[0], "--init", saved("init.pt", state)]
    encoder = {k: v for k, v in source.encoder.state_dict().items() if not k.startswith("norm.")}
    # shaped as --init is
    text = run("finetune.py", *base, "--linear_probe", "--out_dir", tmp("probe"))
    probe = checkpoint(tmp("probe"))
    assert all(torch.equal(probe["model"][k], v) for k, v in encoder.items())
    assert "no best.pt" in text
    assert probe["config"]["head_norm"] and probe["model"]["head_norm.num_batches_tracked"] == 2
    assert probe["model"]["head.weight"].abs().max() > 1e-3
    assert (probe["model"]["fc_norm.weight"] == 1).all()
    assert list(probe["optimizer"]["state"][0]) == ["momentum_buffer"]
    freeze = [*base, "--freeze", 2, "--out_dir", tmp("freeze")]
    run("finetune.py", *freeze)
    state = checkpoint(tmp("freeze"))["model"]
    for k, v in encoder.items():
        still = k.startswith(("patch_embed.", "blocks.0.", "blocks.1."))
        assert torch.equal(state[k], v) == still, k
    # with more frames than --init has, and a table of its own, which eval.py finds
    new = ["--num_frames", 8, "--positions", "new", "--max_steps", 1, "--per_class", 2]
    text = run("finetune.py", *base, *new, "--out_dir", tmp("new"))
    assert "6 videos of 3 classes" in text, text
    assert "made anew" in text and checkpoint(tmp("new"))["config"]["pos_grid"] == [4, 2, 2]
    model, _ = weights.build_model(tmp("new", "last.pt"), verbose=False)
    assert torch.equal(model.pos, position_table((4, 2, 2), 128, (4, 2, 2)))
    text = run("finetune.py", *freeze, "--val_data", labelled()[1])
    assert "validation at step 2" in text and "finished" in text
    assert os.path.exists(tmp("freeze", "best.pt"))


@test
def test_finetuning_mistakes():
    """Impossible flags, labels and lists of finetune.py are named, with what is allowed."""
    train, val = labelled()
    unseen, single, unlabelled = (tmp(f"{n}.tsv") for n in ("unseen", "single", "unlabelled"))
    open(unseen, "w").write(open(val).read().replace("z class", "w class"))
    open(single, "w").write("".join(r.split("\t")[0] + "\tx\n" for r in open(train)))
    open(unlabelled, "w").write("".join(r.split("\t")[0] + "\n" for r in open(train)))
    for args, words in (
            (["--val_data", unseen], ["'w class'", "2.mp4", "x class"]),
            (["--data", single], ["one class only"]),
            (["--data", unlabelled], ["12 of 12", "no label"]),
            (["--batch_size", 13], ["12 videos", "= 13: lower --batch_size or --accum_steps"]),
            (["--batch_size", 8, "--global_batch", 16], ["= 16: lower --global_batch"]),
            (["--linear_probe"], ["--init"]),
            (["--positions", "new"], ["--positions new", "--init"]),
            (["--rand_aug", 2, 11, 0], ["--rand_aug"]),
            (["--freeze", 9], ["--freeze 9", "4 blocks"]),
            (["--crop_area", 0.5, 0.2], ["--crop_area 0.5 0.2"]),
            (["--init", "absent.pth"], ["absent.pth"])):
        text = mistake(finetune, *TUNE, *tune_data(), "--out_dir", tmp("ft_mistake"), *args)
        assert all(w in text for w in words), text
    rows = open(train).read().splitlines()
    rows += [rows[0], rows[0].replace("x class", "turning left")]
    open(unseen, "w").write("\n".join(rows))
    text = call(finetune, *TUNE, *tune_data(), "--data", unseen, "--max_steps", 1,
                "--out_dir", tmp("imbalanced"))
    assert "imbalanced" in text and "turning left 1" in text and "--no-flip?" in text
    assert "5 of the 5 validation videos are also trained on" in text and "would get 40.0 %" in text
