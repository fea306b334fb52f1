"""How 43f57bb.tar.xz was made: a prepared folder and two runs, by the code of commit 43f57bb.

    git worktree add --detach /tmp/43f57bb 43f57bb
    python tests/old/make.py /tmp/43f57bb tests/old/43f57bb.tar.xz

data/             four volumes of three subjects; two of them have a label
task.yaml         the task: two folds, each trains on one case and evaluates the other
pretrain/         a pretraining run, cut after step 2 of 4
finetune/         fold 0 is finished; fold 1 was cut after step 2 of 4
scan.nii.gz       a scan to segment
expected.json     the losses with which the old code itself ended the two runs that were cut
"""

import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile

import torch

CUT_AT = 2
SETTINGS = ("--patch_size 32 --batch_size 1 --precision fp32 --compile false --workers 0 "
            "--log_every 1 --steps 4").split()
TASK = {"data": "data", "sequences": ["FLAIR"], "classes": ["background", "lesion"],
        "labels": {0: 0, 1: 1}, "n_train": 1, "folds": 2}


def call(name, *words):
    """A script of the old code as it is typed, in this process."""
    module, common = __import__(name), __import__("common")
    module.main(common.parse_config(module.Config, list(words)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def cut(name, *words):
    """The same, stopped by a signal after step CUT_AT."""
    common = __import__("common")
    append_log = common.append_log

    def stop(folder, record):
        append_log(folder, record)
        if record["step"] == CUT_AT:
            os.kill(os.getpid(), signal.SIGTERM)

    common.append_log = stop
    call(name, *words)
    common.append_log = append_log


def rounded(tree):
    """The same checkpoint with three bits of each mantissa: it packs to a quarter."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, torch.Tensor) and tree.dtype == torch.float32:
        return (tree.contiguous().view(torch.int32) & ~(2 ** 20 - 1)).view(torch.float32)
    return tree


def losses(folder):
    with open(f"{folder}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["loss"] for line in file]


def nameless(member):
    """A member of the archive without the names of who made it."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def main(code, archive):
    code, archive = os.path.abspath(code), os.path.abspath(archive)
    sys.path[:0] = [code, os.path.join(code, "tests")]
    import common

    import phantom

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        phantom.write("bids", "raw", subjects=1, labelled=2, size=20, seed=7)
        call("prepare_data", "--source", "bids", "--input", "raw", "--out", "data",
             "--workers", "1")
        with open("task.yaml", "w", encoding="utf-8") as file:
            json.dump(TASK, file)

        pretrain = ("pretrain", "--data", "data", "--model", "unet_demo", "--features", "1",
                    "--warmup_epochs", "0", "--out", "pretrain", *SETTINGS)
        cut(*pretrain)
        finetune = ("finetune", "--task", "task.yaml", "--ckpt", "pretrain/last.pt",
                    "--out", "finetune", *SETTINGS)
        call(*finetune, "--folds", "0")
        cut(*finetune, "--folds", "1")

        for path in ("pretrain/last.pt", "finetune/fold_0/last.pt", "finetune/fold_1/last.pt"):
            common.save_checkpoint(path, rounded(common.load_checkpoint(path)))
        scan = min(phantom.Path("raw").rglob("*FLAIR.nii.gz"))
        shutil.copy(scan, "scan.nii.gz")

        # The old code goes on from the same files, in copies of the folders.
        names = ("data", "pretrain", "finetune", "task.yaml", "scan.nii.gz")
        shutil.copytree(".", "whole", ignore=shutil.ignore_patterns("raw"))
        os.chdir("whole")
        call(*finetune)
        call(*pretrain)
        os.chdir(folder)
        expected = {"pretrain": losses("whole/pretrain"), "fold_1": losses("whole/finetune/fold_1")}
        with open("expected.json", "w", encoding="utf-8") as file:
            json.dump(expected, file)

        with tarfile.open(archive, "w:xz") as file:
            for name in (*names, "expected.json"):
                file.add(name, filter=nameless)


if __name__ == "__main__":
    main(*sys.argv[1:])
