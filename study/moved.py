"""Out of domain: the networks of a finished run on the tested heads of the cohort `elsewhere`.

    python study/moved.py --run study/work/lesion-5-spatial-base \\
        --data study/data/elsewhere --out OUT

Writes dice.json, as finetune.py does, with Dice alone.
"""

import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import checkpoint  # noqa: E402
import data  # noqa: E402
import devices  # noqa: E402
import metrics  # noqa: E402
import predict  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = devices.pick_device(options.device)

    folds = {}
    for fold in range(study.FOLDS):
        path = os.path.join(options.run, f"fold_{fold}", "last.pt")
        model, saved = predict.load_network(path, device)
        task, settings = saved["task"], saved["config"]
        cases = tasks.labelled_cases(options.data, "phantoms_c", tuple(task["sequences"]))
        folds[fold] = []
        for case in cases:
            if case.volumes[0].split != "test":
                continue
            volume, geometry = data.read_scan(case)
            classes = predict.segment(model, volume, geometry, settings["patch_size"],
                                      settings["precision"], settings["overlap"])
            truth = tasks.classes_of(data.read_truth(case, geometry), task)
            found = metrics.dice(classes, truth, range(1, len(task["classes"])))
            dice = {task["classes"][number]: None if value != value else value
                    for number, value in found.items()}
            folds[fold].append({"case": case.name, "dice": dice})
    checkpoint.write_text(os.path.join(options.out, "dice.json"), json.dumps({"folds": folds}))


if __name__ == "__main__":
    main()
