#!/usr/bin/env bash
# The whole paper, from raw scans to its tables, in their order. What is done is not done again: the
# same command goes on where it was cut off.
#
#   RAW=/raw ./reproduce.sh       # the paper's runs, on two GPUs
#   DRY=1 ./reproduce.sh          # print the commands, run none
#   SCALE=tiny ./reproduce.sh     # every command for two steps, on synthetic scans, in tiny/
#
# SCALE=tiny takes a narrow network, on the CPU. It shows that the commands work; its Dice means
# nothing.
#
# Hours: 31 and 39 are the paper's, for U-Net XL on two H100. Those with ~ are calculated. For
# pretraining bench/cost.py calculates them. For finetuning they are six folds of 10,000 patches and
# their evaluation on one H100, by FLOPs: too low for MedNeXt and SwinUNETR. The sum is ~230 h of
# two GPUs and ~75 h of one. What the machine at hand takes:
# pretrain.py configs/unet_xl.yaml --estimate.
set -euo pipefail
cd "$(dirname "$0")"

RAW=${RAW:-/raw}          # one folder for each source
GPUS=${GPUS:-2}           # of this node
WORKERS=${WORKERS:-16}    # processes that prepare scans
PYTHON=${PYTHON:-python}  # on the PATH, or an absolute path
DATA=datasets/brains45k
CODE=""                   # where the scripts are

run() {
    printf '%q ' "$@"
    echo
    [ -n "${DRY:-}" ] || "$@"
}
prepare() {               # source, its folder in RAW. Exit code 1: done, except for damaged scans
    run "$PYTHON" "${CODE}prepare_data.py" --source "$1" --input "$RAW/$2" --out "$DATA" \
        --workers "$WORKERS" || [ $? = 1 ]
}
pretrain() {              # model, processes, its configs
    local configs=()
    for name in "$1" "${@:3}"; do configs+=("${CODE}configs/$name.yaml"); done
    run "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$2" "${CODE}pretrain.py" \
        "${configs[@]}" --data "$DATA" $(tiny "$1" --val_fraction 0.05)
}
finetune() {              # model, task, options. It writes runs/<task>-<model>-<origin>
    run "$PYTHON" "${CODE}finetune.py" --task "$(task "$2")" "${@:3}" --data "$DATA" \
        $(tiny "$1" --folds 0,1)
}
compare() {               # name of the files with the result, options and run folders
    run "$PYTHON" "${CODE}compare.py" "${@:2}" --out "runs/$1.md" --csv "runs/$1.csv"
}
task() { echo "$1"; }
tiny() { :; }             # model, options that only SCALE=tiny adds

if [ "${SCALE:-paper}" = tiny ]; then
    CODE="$PWD/" RAW=raw GPUS=1 WORKERS=2
    export OMP_NUM_THREADS=1
    task() { echo "tasks/$1.yaml"; }
    tiny() {
        echo --steps 2 --batch_size 2 --precision fp32 --workers 0 --device cpu "${@:2}"
        case $1 in
            swinunetr) echo --features 16 --patch_size 64 ;;
            *) echo --features 4 --patch_size 32 ;;
        esac
    }
    phantoms() {          # source, folder, subjects without and with labels
        run "$PYTHON" "${CODE}tests/phantom.py" --layout "$1" --out "raw/$2" --size 40 \
            --subjects "$3" --labelled "$4"
    }
    if [ -z "${DRY:-}" ]; then
        mkdir -p "${WORK:=tiny}/tasks"
        cd "$WORK"
        for path in "$CODE"configs/tasks/*.yaml; do
            sed '$a n_train: 3' "$path" >"tasks/${path##*/}"
        done
    fi
    phantoms adni ADNI 1 0
    phantoms oasis3 OASIS3 1 0
    phantoms oasis4 OASIS4 1 0
    phantoms ppmi PPMI 1 0
    phantoms brats21 BraTS2021 0 8
    phantoms isles22 ISLES-2022 0 8
    phantoms wmh WMH 5 6
    phantoms msseg1 MSSEG1 1 1
    phantoms msd Task01_BrainTumour 1 1
fi

# ---- Table 1: BRAINS-45K. The paper gives no time for it; bench/prepare.py measures single scans.
prepare adni ADNI
prepare oasis3 OASIS3
prepare oasis4 OASIS4
prepare ppmi PPMI
prepare brats21 BraTS2021
prepare isles22 ISLES-2022
prepare wmh WMH
prepare msseg1 MSSEG1
prepare msd Task01_BrainTumour
run "$PYTHON" "${CODE}prepare_data.py" --out "$DATA" --table true

# ---- Table 2, and the skips of section 3.1: the choice of decoder, without augmentation. Each
# network is finetuned on BraTS21 and evaluated on its other training cases, 918 a fold (~2 h).
pretrain unet_xl "$GPUS" ablations/standard_decoder    # 39 h
pretrain unet_xl "$GPUS" ablations/no_augment          # 31 h
pretrain unet_xl "$GPUS" ablations/skips               # over 39 h
for ablation in standard_decoder no_augment skips; do
    finetune unet_xl brats21_cv --ckpt "runs/$ablation/last.pt" --out "runs/brats21_cv-$ablation"
done
compare table2 --table 2 runs/brats21_cv-{standard_decoder,no_augment,skips}

# ---- Table 3: augmentation in pretraining, beside no_augment.
pretrain unet_xl "$GPUS"                               # 31 h
finetune unet_xl brats21_cv --ckpt runs/unet_xl/last.pt
compare table3 --table 3 runs/brats21_cv-{no_augment,unet_xl-amaes}

# ---- Tables 4 and 6: every network, from scratch and pretrained.
pretrain unet_b "$GPUS"                                # ~11 h
pretrain mednext_m "$GPUS"                             # ~33 h
pretrain mednext_l "$GPUS"                             # ~48 h
pretrain swinunetr 1                                   # ~40 h; one GPU contrasts its two samples
runs=()
for task in brats21 isles22 wmh wmh_ood; do            # wmh_ood uses the networks of wmh: minutes
    # ~1.7 h a task for U-Net XL, 0.4 for B; MedNeXt 0.5 for M, 0.6 for L, 0.7 for L with its own
    # decoder; 0.7 for SwinUNETR
    for model in unet_xl unet_b mednext_m mednext_l mednext_l_mednextdec swinunetr; do
        finetune "$model" "$task" --model "$model"
        runs+=("runs/$task-$model-scratch")
    done
    for model in unet_xl unet_b mednext_m mednext_l swinunetr; do
        finetune "$model" "$task" --ckpt "runs/$model/last.pt"
        origin=amaes
        if [ "$model" = swinunetr ]; then origin=swin; fi
        runs+=("runs/$task-$model-$origin")
    done
done
compare table4 --table 4 "${runs[@]}"
compare table6 --table 6 "${runs[@]}"

# ---- Section 4.3 compares networks from scratch, with all augmentations, and pretrained networks,
# with spatial ones alone. Here each start gets the other's augmentation, for U-Net XL (~10 h).
for task in brats21 isles22 wmh; do
    start="runs/$task-unet_xl"
    finetune unet_xl "$task" --model unet_xl --augment spatial --out "$start-scratch-spatial"
    finetune unet_xl "$task" --ckpt runs/unet_xl/last.pt --augment all --out "$start-amaes-all"
    compare "augment-$task" "$start"-{scratch,scratch-spatial,amaes,amaes-all}
done
