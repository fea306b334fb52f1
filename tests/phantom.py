"""Synthetic head scans as NIfTI, in every source's tree, for the tests and the demo.

    python tests/phantom.py --out raw --subjects 24 --labelled 12 --layout bids --size 64 --seed 0

No patient's data is in them. A head is a set of ellipsoids in mm: scalp, skull, cortex with folds,
white matter, ventricles. Its shape differs from subject to subject, and so do noise, bias field,
voxel size, axis order and obliqueness. The labelled subjects have lesions in the white matter,
bright in FLAIR, with an exact label map.

A layout yields (path, kind, image). The kind is what the file is for the paper, known without the
program under test: volume (pretrained on), test (a usable volume that is not), either with `x4` if
a 4-D file holds four, label, junk (to be skipped by its path), reject (turned away once opened, by
the reference's rule for ADNI, OASIS and PPMI: 3-D, no side under 15 voxels, no negative value),
None (a text file).
"""

import argparse
import json
from functools import partial
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np

# In each contrast, the intensity of air, scalp, skull, cerebrospinal fluid, cortex, white matter,
# lesion.
CONTRASTS = {
    "T1": (0, 800, 120, 180, 480, 700, 380), "T2": (0, 500, 80, 950, 560, 400, 800),
    "FLAIR": (0, 450, 70, 120, 520, 420, 950), "T1ce": (0, 850, 130, 180, 500, 700, 900),
    "DWI": (0, 90, 30, 150, 480, 400, 900), "ADC": (0, 150, 60, 950, 330, 300, 140),
    "PD": (0, 600, 100, 620, 760, 560, 800),
}
SUFFIX = {"T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR", "DWI": "dwi"}
# Axis order and flips of the stored grid, and voxel size relative to the first axis.
GRIDS = (("RAS", (1, 1, 1)), ("LPS", (1, 1, 1)), ("LAS", (0.9, 0.9, 1.6)), ("PSR", (1, 1, 1.2)),
         ("RAS", (1.2, 1, 1)))


def anatomy(rng, size):
    """Everything about one subject: folds, ventricles, lesions, and the semi-axes in mm.

    size: length of the head in mm."""
    axes = size / 2 * np.array([0.74, 0.95, 0.80]) * rng.uniform(0.92, 1.05, 3)
    lesions = []
    for _ in range(rng.integers(2, 5)):
        direction = rng.normal(size=3)
        place = direction / np.linalg.norm(direction) * rng.uniform(0.3, 0.55) * axes
        lesions.append((place, size * rng.uniform(0.06, 0.13), rng.uniform(0.7, 1.4, 3)))
    return {"axes": axes, "folds": rng.uniform(0, 2 * np.pi, (6, 3)),
            "waves": rng.uniform(4, 9, (6, 3)), "ventricle": rng.uniform(0.8, 1.5),
            "lesions": lesions}


def tissue(head, points, lesions):
    """Class (see CONTRASTS) of points (..., 3) in mm, and which lesion they lie in (0: none)."""
    unit = points / head["axes"]
    radius = np.linalg.norm(unit, axis=-1)
    angle = unit / np.maximum(radius, 1e-6)[..., None]
    folds = sum(np.cos(angle @ (2 * wave) + phase.sum())
                for wave, phase in zip(head["waves"], head["folds"], strict=True))
    classes = np.zeros(radius.shape, np.uint8)
    classes[radius < 1.0] = 1
    classes[radius < 0.93] = 2
    classes[radius < 0.87] = 3
    classes[radius < 0.83 + 0.012 * folds] = 4
    classes[radius < 0.68 + 0.03 * folds] = 5
    for side in (-1, 1):
        offset = (unit - np.array([0.13 * side, 0.05, 0.08])) / np.array([0.07, 0.3, 0.14])
        classes[np.linalg.norm(offset, axis=-1) < head["ventricle"]] = 3
    found = np.zeros(radius.shape, np.uint8)
    for number, (place, size, shape) in enumerate(head["lesions"] if lesions else (), start=1):
        inside = (np.linalg.norm((points - place) / shape, axis=-1) < size) & (radius < 0.8)
        classes[inside], found[inside] = 6, number
    return classes, found


def scan(head, rng, contrast, size, spacing=(1, 1, 1), axes="RAS", degrees=0.0, lesions=False,
         stripped=False):
    """One scan of a head and its lesion map: two nibabel images on one grid.

    spacing in mm; axes: order and direction of the stored axes; degrees: obliqueness about the
    first one. stripped: brain only, on exact 0, as BraTS; otherwise with scalp, skull and noisy
    air."""
    shape = np.maximum(16, np.ceil(size * 1.04 / np.array(spacing)).astype(int))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ affine
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    classes, found = tissue(head, points, lesions)
    values = np.array(CONTRASTS[contrast], np.float32)[classes]
    values *= rng.normal(1, 0.02, values.shape)
    values *= 1 + 0.15 * (points / size @ rng.uniform(-1, 1, 3))  # receive field
    values = np.hypot(values + rng.normal(0, 12, shape), rng.normal(0, 12, shape))  # Rician noise
    if stripped:
        values[(classes < 3)] = 0
    images = []
    for array in (values.astype(np.int16), found):
        image = nib.Nifti1Image(array, affine)
        wanted = nib.orientations.axcodes2ornt(axes)
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
        images.append(image.as_reoriented(turn))
    return images


def relabel(found, values, dtype=np.uint8):
    """A lesion map of `scan` as a label map: lesion k (0: none) becomes values[k], of six."""
    return nib.Nifti1Image(np.array(values, dtype)[np.asarray(found.dataobj)], found.affine)


def below_zero(image):
    """The scan with air around -25, as ringing leaves it."""
    return nib.Nifti1Image(np.asarray(image.dataobj) - np.int16(40), image.affine)


def hide(out, truth):
    """Add what macOS leaves in a copied or unzipped tree, at the first image, and a text file."""
    first = PurePosixPath(next(iter(truth)))
    for path in (first.parent / f"._{first.name}", "__MACOSX" / first):
        Path(out, path).parent.mkdir(parents=True, exist_ok=True)
        Path(out, path).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X".ljust(4096, b"\0"))
        truth[str(path)] = "junk"
    Path(out, "README.txt").write_text("Synthetic heads.\n")


def write(layout, out, subjects, labelled, size=32, seed=0):
    """Write one source's tree below `out`, return {path relative to out: kind} of its images.

    Where there is a training and a test part (WMH, MSSEG1, MSD, nnU-Net), `labelled` counts the
    first and `subjects` the second; a source without labels has subjects + labelled subjects."""
    rngs = [np.random.default_rng([seed, number]) for number in range(subjects + labelled)]
    people = [(number, number >= subjects, anatomy(rng, size), rng)
              for number, rng in enumerate(rngs)]
    truth = {}
    for path, kind, content in LAYOUTS[layout](people, size):
        Path(out, path).parent.mkdir(parents=True, exist_ok=True)
        if kind is None:
            Path(out, path).write_text(content)
        else:
            content.to_filename(Path(out, path))
            truth[path] = kind
    if truth and layout not in ("bids", "brats21"):  # clean for the demo
        hide(out, truth)
    return truth


# ----------------------------------------------------------------- sources of free-text series
# What a subject has: form -> names. The first two of ADNI are one acquisition, raw and processed.
ADNI = {"volume": "MPRAGE MPR____N3__Scaled MT1__GradWarp__N3m Accelerated_Sagittal_MPRAGE "
                  "Axial_3TE_T2_STAR Sagittal_3D_FLAIR",
        "4-D": "Axial_DTI", "negative": "MPR-R__GradWarp__B1_Correction", "thin": "Axial_T2-FLAIR",
        "junk": "localizer Axial_rsfMRI__Eyes_Open_ Axial_2D_PASL Perfusion_Weighted Field_Mapping"}
PPMI = {"volume": "MPRAGE_GRAPPA SAG_T1_3D_MPRAGE AX_FLAIR T2_AXIAL", "4-D": "AX_DTI_32_DIR",
        "negative": "SAG_3D_FLAIR", "thin": "AX_T2_FSE",
        "junk": "2D_GRE-MT ep2d_RESTING_STATE localizer Reconstructed_DaTSCAN"}
OASIS = {"volume": "anat1/run-01_T1w anat3/acq-TSE_T2w anat4/FLAIR anat2/run-02_T1w anat5/T2star "
                   "anat6/angio swi1/swi swi2/minIP dwi1/run-01_dwi anat7/GRE",
         "4-D": "dwi2/run-02_dwi", "negative": "anat8/run-03_T1w",
         "thin": "anat9/acq-hippocampus_T2w",
         "junk": "func1/task-rest_run-01_bold func2/asl fmap1/fieldmap"}


def series(table, head, rng, size):
    """(place, name, kind, image) of all a subject has in one of the tables above."""
    pairs = [(form, name) for form, names in table.items() for name in names.split()]
    for place, (form, name) in enumerate(pairs):
        contrast = "FLAIR" if "FLAIR" in name else "T2" if "T2" in name else "T1"
        axes, ratio = GRIDS[place % len(GRIDS)]
        image, _ = scan(head, rng, contrast, size, ratio, axes, rng.uniform(-12, 12))
        if form == "4-D":
            image = nib.concat_images([image] * 4)
        elif form == "negative":
            image = below_zero(image)
        elif form == "thin":
            image = image.slicer[:, :, 10:22]
        yield place, name, form if form in ("volume", "junk") else "reject", image


def loni(root, table, people, size):
    """ADNI/002_S_0413/<description>/2006-05-19_16_00_47.0/<I or S number>/ADNI_*.nii[.gz].

    Two visits. PPMI: subjects 3000, 3001, ..., every second series one folder deeper, in nifti/
    with dicom/ beside it."""
    for number, _, head, rng in people:
        subject = f"{number + 2:03}_S_{413 + number:04}" if root == "ADNI" else f"{3000 + number}"
        for place, description, kind, image in series(table, head, rng, size):
            date = f"{2006 + place % 4 // 2}-05-19_16_{place // 2:02}_47.0"
            key = f"{'IS'[place % 2]}{40657 + 100 * number + place}"
            folder = f"{root}/{subject}/{description}/{date}/{key}"
            if root == "PPMI" and place % 2:
                yield f"{folder}/dicom/IM_0001.dcm", None, "DICM"
                folder += "/nifti"
            name = f"{root}_{subject}_MR_{description}_Br_20070216232854688_{key}"
            yield f"{folder}/{name}.nii{'.gz' if place % 3 == 0 else ''}", kind, image


def oasis(start, people, size):
    """OAS30001_MR_d0129/anat1/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz and .json.

    The second session has anat3/{NIFTI,BIDS}/, the third
    scans/anat4-FLAIR/resources/{NIFTI,BIDS}/files/; 0AS_data_files/ and OAS30001_AV45_d2340/pet1/
    beside. OASIS4: all in OASIS4_images/, some names without the sequence."""
    root, first = ("", 1) if start == "OAS3" else ("OASIS4_images/", 2213)
    for number, _, head, rng in people:
        subject = f"{start}{first + number:04}"
        for place, scan_name, kind, image in series(OASIS, head, rng, size):
            (folder, end), day = scan_name.split("/"), ("d0129", "d0757", "d2340")[place % 3]
            deep = f"scans/{folder}-{end.split('_')[-1]}/resources/NIFTI/files"
            folder = f"{root}{subject}_MR_{day}/" + (folder, f"{folder}/NIFTI", deep)[place % 3]
            yield f"{folder}/sub-{subject}_ses-{day}_{end}.nii.gz", kind, image
            beside = folder.replace("NIFTI", "BIDS")
            yield f"{beside}/sub-{subject}_ses-{day}_{end}.json", None, "{}"
        name, (extra, _) = f"sub-{subject}_ses-d2340", scan(head, rng, "FLAIR", size)
        yield f"{root}{subject}_AV45_d2340/pet1/NIFTI/{name}_acq-AV45_pet.nii.gz", "junk", extra
        yield f"{root}0AS_data_files/{subject}_MR_d2340/anat1/{name}_T1w.nii.gz", "junk", extra
        if start == "OAS4":
            for folder, kind in (("anat10-FLAIR", "volume"), ("func3-bold", "junk")):
                files = f"{root}{subject}_MR_d2340/scans/{folder}/resources/NIFTI/files"
                yield f"{files}/scan10.nii.gz", kind, extra


# --------------------------------------------------------------- challenges and generic layouts
def bids(people, size):
    """sub-U000/ses-01/anat/sub-U000_ses-01_{T1w,T2w,FLAIR}.nii.gz.

    The labelled, sub-L000, have FLAIR and *_lesion.nii.gz only."""
    for number, labelled, head, rng in people:
        axes, ratio = GRIDS[rng.integers(len(GRIDS))]
        name = f"sub-{'L' if labelled else 'U'}{number:03}"
        start = f"{name}/ses-01/anat/{name}_ses-01"
        for contrast in ["FLAIR"] if labelled else rng.permutation(["T1", "T2", "FLAIR"])[:2]:
            degrees = rng.uniform(-12, 12)
            image, found = scan(head, rng, str(contrast), size, ratio, axes, degrees, labelled)
            yield f"{start}_{SUFFIX[contrast]}.nii.gz", "volume", image
            if labelled:
                yield f"{start}_lesion.nii.gz", "label", relabel(found, (0, 1, 1, 1, 1, 1))


def brats21(people, size):
    """BraTS2021_00001/BraTS2021_00001_{flair,t1,t1ce,t2,seg}.nii.gz.

    LPS, 1 mm, skull-stripped, labels 0, 1, 2, 4; the unlabelled have no seg. The quarter to hold
    out is drawn at random, so all are `volume`."""
    for number, labelled, head, rng in people:
        name = f"BraTS2021_{number:05}"
        for contrast in ("FLAIR", "T1", "T1ce", "T2"):
            image, found = scan(head, rng, contrast, size, axes="LPS", lesions=True, stripped=True)
            yield f"{name}/{name}_{contrast.lower()}.nii.gz", "volume", image
        if labelled:
            yield f"{name}/{name}_seg.nii.gz", "label", relabel(found, (0, 1, 2, 4, 2, 2))


def isles22(folders, flair_name, people, size):
    """ISLES-2022/sub-strokecase0001/ses-0001/{anat/*_FLAIR,dwi/*_dwi,dwi/*_adc}.nii.gz and
    ISLES-2022/derivatives/sub-strokecase0001/ses-0001/*_{msk.nii.gz,snp.png}; or, as in the
    challenge, rawdata/sub-strokecase0001/ses-0001/*_{flair,dwi,adc}.nii.gz and derivatives/ beside
    rawdata/.

    DWI, ADC and mask share an oblique grid, with negative values; FLAIR has its own. Of several
    labelled cases, the last has an empty mask."""
    root, anat, dwi, derivatives = folders
    for number, labelled, head, rng in people:
        case, tilt = f"sub-strokecase{number + 1:04}", rng.uniform(8, 15)
        start, name = f"{root}/{case}/ses-0001", f"{case}_ses-0001"
        for contrast in ("DWI", "ADC"):
            image, found = scan(head, rng, contrast, size, (2, 2, 2), "LAS", tilt, labelled)
            yield f"{start}/{dwi}{name}_{contrast.lower()}.nii.gz", "volume", below_zero(image)
            yield f"{start}/{dwi}{name}_{contrast.lower()}.json", None, "{}"
        image, _ = scan(head, rng, "FLAIR", size, (0.8, 0.8, 2.2), "LAS", -tilt, labelled)
        yield f"{start}/{anat}{name}_{flair_name}.nii.gz", "volume", image
        if labelled:
            values = [0] * 6 if number and number == people[-1][0] else [0, 1, 1, 1, 1, 1]
            beside = f"{derivatives}/{case}/ses-0001/{name}"
            yield f"{beside}_msk.nii.gz", "label", relabel(found, values)
            yield f"{beside}_snp.png", None, ""


def wmh(people, size):
    """{training,test}/{Utrecht,Singapore,Amsterdam/GE3T}/<id>/{orig,pre}/{FLAIR,T1,3DT1}.nii.gz and
    <id>/wmh.nii.gz: float32, 1 hyperintensity, 2 other pathology; two more scanners in test;
    additional_annotations/observer_o3/training/<site>/<id>/result.nii.gz."""
    seen = ("Utrecht", "Singapore", "Amsterdam/GE3T")
    for number, training, head, rng in people:
        sites = seen if training else ("Amsterdam/GE1T5", "Amsterdam/Philips_VU .PETMR_01.", *seen)
        part, kind = ("training", "volume") if training else ("test", "test")
        place = f"{part}/{sites[number % len(sites)]}/{number}"
        for name in ("FLAIR", "T1"):  # on one grid, the label's
            image, found = scan(head, rng, name, size, (1, 1, 2), "LPS", 5, lesions=True)
            yield f"{place}/pre/{name}.nii.gz", kind, image
            yield f"{place}/orig/{name}.nii.gz", "junk", image
        label = relabel(found, (0, 1, 2, 1, 1, 1), np.float32)
        yield f"{place}/wmh.nii.gz", "label", label
        image, found = scan(head, rng, "T1", size, axes="PSR", lesions=True)
        yield f"{place}/pre/3DT1.nii.gz", "junk", image
        yield f"{place}/orig/3DT1.nii.gz", "junk", image
        yield f"{place}/orig/3DT1_mask.nii.gz", "junk", relabel(found, (1, 1, 1, 1, 1, 1))
        yield f"{place}/orig/reg_3DT1_to_FLAIR.txt", None, ""
        if training:
            yield f"additional_annotations/observer_o3/{place}/result.nii.gz", "junk", label


def msseg1(people, size):
    """{Training,Testing}/Center_01/Patient_01/Raw_Data/FLAIR.nii.gz and
    Preprocessed_Data/FLAIR_preprocessed.nii.gz, also T1, T2, DP, GADO, and
    Masks/{Consensus,ManualSegmentation_1,ManualSegmentation_2}.nii.gz."""
    contrasts = {"FLAIR": "FLAIR", "T1": "T1", "T2": "T2", "DP": "PD", "GADO": "T1ce"}
    for number, training, head, rng in people:
        part, kind = ("Training", "volume") if training else ("Testing", "test")
        centers = ("01", "07", "08") if training else ("03", "01", "07", "08")
        place = f"{part}/Center_{centers[number % len(centers)]}/Patient_{number + 1:02}"
        for name, contrast in contrasts.items():
            image, found = scan(head, rng, contrast, size, axes="PSR", degrees=4, lesions=True)
            yield f"{place}/Preprocessed_Data/{name}_preprocessed.nii.gz", kind, image
            yield f"{place}/Raw_Data/{name}.nii.gz", "junk", image
        label = relabel(found, (0, 1, 1, 1, 1, 1))
        yield f"{place}/Masks/Consensus.nii.gz", "label", label
        for rater in (1, 2):
            yield f"{place}/Masks/ManualSegmentation_{rater}.nii.gz", "junk", label


def msd(people, size):
    """Task01_BrainTumour/{imagesTr,labelsTr}/BRATS_001.nii.gz, imagesTs/BRATS_485.nii.gz and
    dataset.json.

    A 4-D file holds FLAIR, T1w, T1gd, T2w. The paper pretrains on imagesTs."""
    root = "Task01_BrainTumour"
    for number, training, head, rng in people:
        scans = [scan(head, rng, contrast, size, axes="LPS", lesions=True, stripped=True)
                 for contrast in ("FLAIR", "T1", "T1ce", "T2")]
        image, name = nib.concat_images([image for image, _ in scans]), f"BRATS_{number + 1:03}"
        if training:
            yield f"{root}/imagesTr/{name}.nii.gz", "test x4", image
            label = relabel(scans[0][1], (0, 1, 2, 3, 1, 1))
            yield f"{root}/labelsTr/{name}.nii.gz", "label", label
        else:
            yield f"{root}/imagesTs/BRATS_{number + 485:03}.nii.gz", "volume x4", image
    yield f"{root}/dataset.json", None, json.dumps({
        "name": "BRATS", "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor",
                   "3": "enhancing tumour"},
        "numTraining": sum(person[1] for person in people)})


def fomo60k(people, size):
    """sub_1/ses_1/{t1,t2,flair,t1c}.nii.gz, sub_1/ses_2/{t2s,dwi,swi,scan_1}.nii.gz."""
    names = {"t1": "T1", "t2": "T2", "flair": "FLAIR", "t1c": "T1ce",
             "t2s": "T2", "dwi": "DWI", "swi": "T2", "scan_1": "PD"}
    for number, _, head, rng in people:
        for place, (name, contrast) in enumerate(names.items()):
            axes, _ = GRIDS[place % len(GRIDS)]
            image, _ = scan(head, rng, contrast, size, axes=axes, stripped=True)
            yield f"sub_{number + 1}/ses_{1 + place // 4}/{name}.nii.gz", "volume", image


def nnunet(people, size):
    """Dataset501_Lesions/{imagesTr/sub00_0000,imagesTr/sub00_0001,labelsTr/sub00}.nii.gz, imagesTs/
    and nnU-Net v2's dataset.json: channels FLAIR and T1.

    Cases of odd number have an underscore, sub_01."""
    root = "Dataset501_Lesions"
    for number, training, head, rng in people:
        case, (axes, ratio) = f"sub{'_' * (number % 2)}{number:02}", GRIDS[number % len(GRIDS)]
        part, kind = ("Tr", "volume") if training else ("Ts", "test")
        for channel, contrast in enumerate(("FLAIR", "T1")):
            image, found = scan(head, rng, contrast, size, ratio, axes, 6, lesions=True)
            yield f"{root}/images{part}/{case}_{channel:04}.nii.gz", kind, image
        if training:
            yield f"{root}/labelsTr/{case}.nii.gz", "label", relabel(found, (0, 1, 1, 1, 1, 1))
    yield f"{root}/dataset.json", None, json.dumps({
        "channel_names": {"0": "FLAIR", "1": "T1"}, "labels": {"background": 0, "lesion": 1},
        "numTraining": sum(person[1] for person in people), "file_ending": ".nii.gz"})


LAYOUTS = {
    "adni": partial(loni, "ADNI", ADNI), "ppmi": partial(loni, "PPMI", PPMI),
    "oasis3": partial(oasis, "OAS3"), "oasis4": partial(oasis, "OAS4"),
    "brats21": brats21, "wmh": wmh, "msseg1": msseg1, "msd": msd,
    "isles22": partial(isles22, ("ISLES-2022", "anat/", "dwi/", "ISLES-2022/derivatives"), "FLAIR"),
    "isles22_rawdata": partial(isles22, ("rawdata", "", "", "derivatives"), "flair"),
    "fomo60k": fomo60k, "nnunet": nnunet, "bids": bids,
}
write_bids, write_brats21 = partial(write, "bids"), partial(write, "brats21")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--subjects", type=int, default=24, help="unlabelled subjects")
    parser.add_argument("--labelled", type=int, default=12,
                        help="subjects with lesions and label maps")
    parser.add_argument("--layout", choices=LAYOUTS, default="bids")
    parser.add_argument("--size", type=int, default=64, help="length of the head in mm")
    parser.add_argument("--seed", type=int, default=0)
    write(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
