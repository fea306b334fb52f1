"""predict.py on what users have: grids, headers, formats, label maps, what is no checkpoint."""

import dataclasses
import gzip
import os
import subprocess
import sys
import tarfile
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, mistake
from runs import words_of

import checkpoint
import config
import finetune
import models
import predict
import tasks


def network(path, sequences=("FLAIR",)):
    """A finetuned checkpoint with weights as drawn, which segment something of most scans."""
    torch.manual_seed(0)
    model = models.build_model("unet_demo", "segment", len(sequences), 2, features=4)
    task = tasks.Task("d", ("background", "lesion"), {0: 0, 1: 1}, sequences)
    cfg = finetune.Config("t", patch_size=32, precision="fp32", features=4, merge="legacy")
    checkpoint.save_checkpoint(path, {
        "kind": "finetune", "row": "unet_demo", "config": dataclasses.asdict(cfg),
        "task": dataclasses.asdict(task), "model": model.state_dict()})
    return path


def head(seed=0, n=32):
    """A ball of brain in a cube, float32."""
    z, y, x = np.indices((n, n, n)) - (n - 1) / 2 + np.array([1, 2, 0]).reshape(3, 1, 1, 1)
    radius = np.sqrt(z ** 2 + y ** 2 + x ** 2)
    noise = np.random.default_rng(seed).normal(0, 20, radius.shape)
    brain = 300 + 100 * np.cos(z / 4) + noise
    return np.where(radius < 0.4 * n, brain, 0).clip(0).astype(np.float32)


def segment(folder, capsys, *scans, out="seg.nii.gz", **settings):
    """predict.py on scans in a folder -> the image it wrote, and what it printed."""
    if not (folder / "net.pt").exists():
        network(folder / "net.pt", ("FLAIR", "T1")[:len(scans)])
    settings |= {"ckpt": folder / "net.pt", "out": folder / out, "overlap": 0}
    words = [*map(str, scans), *words_of(settings)]
    predict.main(config.parse_config(predict.Config, words))

    # Read at once, and whole: another call overwrites the file.
    written = gzip.decompress((folder / out).read_bytes())
    return nib.Nifti1Image.from_bytes(written), capsys.readouterr().out


AFFINE = np.array([[1.0, 0, 0, -16], [0, 1, 0, -12], [0, 0, 1, -9], [0, 0, 0, 1]])


@pytest.mark.parametrize("axes", ["LPS", "PSR", "AIL"])
def test_channels_on_other_axes_are_one_grid(tmp_path, capsys, axes):
    """The second channel, the label map, or the first channel alone stored otherwise: the same
    result, on the first scan's own grid."""
    flair, t1 = (nib.Nifti1Image(head(seed), AFFINE) for seed in range(2))
    truth = nib.Nifti1Image((head() > 350).astype(np.uint8), AFFINE)
    wanted = nib.orientations.axcodes2ornt(axes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), wanted)
    for name, image in (("flair", flair), ("t1", t1), ("truth", truth)):
        image.to_filename(tmp_path / f"{name}.nii")
        image.as_reoriented(turn).to_filename(tmp_path / f"{name}_turned.nii")

    def result(one, two, three):
        return segment(tmp_path, capsys, tmp_path / f"{one}.nii", tmp_path / f"{two}.nii",
                       truth=tmp_path / f"{three}.nii")

    plain, printed = result("flair", "t1", "truth")
    assert len(np.unique(plain.dataobj)) == 2
    for names in (("flair", "t1_turned", "truth"), ("flair", "t1", "truth_turned")):
        found, said = result(*names)
        assert np.array_equal(found.dataobj, plain.dataobj)
        assert np.array_equal(found.affine, plain.affine)
        assert said.split("Dice")[1] == printed.split("Dice")[1]
    found, said = result("flair_turned", "t1", "truth")
    assert nib.aff2axcodes(found.affine) == tuple(axes)
    assert np.array_equal(nib.as_closest_canonical(found).dataobj, plain.dataobj)
    assert said.split("Dice")[1] == printed.split("Dice")[1]


def test_features_say_which_file_is_which_channel(tmp_path, capsys):
    network(tmp_path / "net.pt", ("FLAIR", "T1"))
    paths = [str(tmp_path / f"{name}.nii") for name in ("a", "b_seg")]
    for seed, path in enumerate(paths):
        nib.Nifti1Image(head(seed), AFFINE).to_filename(path)
    words = [*paths, "--ckpt", str(tmp_path / "net.pt"), "--features", str(tmp_path / "f.npy")]
    predict.main(config.parse_config(predict.Config, words))
    assert capsys.readouterr().out.startswith(
        f"FLAIR: {paths[0]}\nT1: {paths[1]}\n"
        f"named as scans, though they sound like label maps: {paths[1]}\n")


def test_channels_on_other_grids_are_refused(tmp_path):
    network(tmp_path / "net.pt", ("FLAIR", "T1"))
    nib.Nifti1Image(head(), AFFINE).to_filename(tmp_path / "flair.nii")
    moved, scaled = AFFINE.copy(), np.diag([1, 1, 1.5, 1])
    moved[0, 3] += 0.5
    for name, array, affine in (("moved", head(), moved), ("scaled", head(), scaled @ AFFINE),
                                ("cut", head()[:-1], AFFINE)):
        nib.Nifti1Image(array, affine).to_filename(tmp_path / f"{name}.nii")
        line = mistake("predict", tmp_path / "flair.nii", tmp_path / f"{name}.nii",
                       ckpt=tmp_path / "net.pt", out=tmp_path / "x.nii.gz")
        assert f"{name}.nii is not on the grid of" in line and line.count(f"{name}.nii") == 1
    assert not (tmp_path / "x.nii.gz").exists()


def telling(image):
    """A scan whose header says all that a NIfTI header can."""
    header = image.header
    header["cal_max"], header["cal_min"] = 900, 100
    header["descrip"], header["aux_file"] = b"Doe^John 1950", b"Doe.txt"
    if "db_name" in header:  # not in NIfTI-2
        header["db_name"] = b"Doe"
    header.set_intent("z score", (), "Doe")
    header.set_slope_inter(2, 3)
    header["toffset"], header["slice_duration"], header["slice_end"] = 1, 2, 3
    header.set_dim_info(0, 1, 2)
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"PatientName=Doe^John"))
    return image


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 3), (1, 4)])
def test_the_header_of_a_segmentation_is_its_grid(tmp_path, capsys, kind, codes):
    image = telling(kind(head().astype(np.int16), AFFINE))
    turn = [[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1.2, 0], [0, 0, 0, 1]]
    turned = AFFINE @ np.array(turn)
    image.set_qform(turned, codes[0])
    image.set_sform(turned, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(tmp_path / ("scan.img" if kind is nib.Nifti1Pair else "scan.nii"))
    source = nib.load(tmp_path / ("scan.img" if kind is nib.Nifti1Pair else "scan.nii"))

    found, printed = segment(tmp_path, capsys, source.get_filename())
    assert printed.startswith(f"FLAIR: {source.get_filename()}\n")
    assert b"Doe" not in gzip.decompress((tmp_path / "seg.nii.gz").read_bytes())
    assert found.header.extensions == [] and found.get_data_dtype() == np.uint8
    for name in ("q", "s"):
        (ours, code), (theirs, known) = (getattr(image, f"get_{name}form")(coded=True)
                                         for image in (found, source))
        assert code == known and (ours is None or np.allclose(ours, theirs, atol=1e-5))
    assert np.allclose(found.affine, source.affine, atol=1e-5)
    assert found.header.get_zooms() == pytest.approx(source.header.get_zooms())
    assert found.header.get_xyzt_units() == source.header.get_xyzt_units()
    plain = nib.Nifti1Header()
    for field in ("cal_max", "cal_min", "descrip", "aux_file", "db_name", "intent_code",
                  "intent_name", "toffset", "slice_duration", "slice_end", "dim_info"):
        assert found.header[field] == plain[field], field


@pytest.mark.parametrize(("kind", "name"), [
    (nib.MGHImage, "scan.mgz"), (nib.Spm2AnalyzeImage, "scan.img")])
def test_the_header_of_a_format_without_form_codes(tmp_path, capsys, kind, name):
    affine = np.diag([1.2, 1, 1, 1]) @ AFFINE
    image = kind(head(), affine if kind is nib.MGHImage else np.diag([-1.2, 1, 1, 1]))
    if kind is nib.Spm2AnalyzeImage:
        image.header["descrip"] = b"Doe^John 1950"
    image.to_filename(tmp_path / name)
    found, _ = segment(tmp_path, capsys, tmp_path / name)
    source = nib.load(tmp_path / name)
    assert found.shape == source.shape and np.allclose(found.affine, source.affine, atol=1e-5)
    assert found.header.get_xyzt_units()[0] == "mm"
    assert b"Doe" not in gzip.decompress((tmp_path / "seg.nii.gz").read_bytes())


def test_scans_as_users_have_them(tmp_path, capsys):
    """The same head in other formats and habits: the same segmentation.

    And what was mended is said."""
    plain = nib.Nifti1Image(head(), AFFINE)
    plain.to_filename(tmp_path / "plain.nii.gz")
    expected = np.asarray(segment(tmp_path, capsys, tmp_path / "plain.nii.gz")[0].dataobj)
    assert len(np.unique(expected)) == 2

    nib.MGHImage(head(), AFFINE.astype(np.float32)).to_filename(tmp_path / "free.mgz")
    (tmp_path / "packed.nii").write_bytes((tmp_path / "plain.nii.gz").read_bytes())
    plain.to_filename(tmp_path / "x.nii")
    (tmp_path / "plain_named.nii.gz").write_bytes((tmp_path / "x.nii").read_bytes())
    holes, ringing = head(), head()
    holes[holes == 0] = np.nan
    ringing[0, 0] = -1
    nib.Nifti1Image(holes, AFFINE).to_filename(tmp_path / "holes.nii")
    nib.Nifti1Image(ringing, AFFINE).to_filename(tmp_path / "ringing.nii")
    nib.Nifti1Image(head()[..., None], AFFINE).to_filename(tmp_path / "fourth.nii")
    lying = nib.Nifti1Image(head(), AFFINE)
    lying.set_qform(AFFINE, 1)
    lying.set_sform(AFFINE @ np.diag([2.0, 2, 2, 1]), 1)
    lying.header["pixdim"][1:4] = 1
    lying.to_filename(tmp_path / "lying.nii")

    said = {"free.mgz": "", "packed.nii": "", "plain_named.nii.gz": "", "fourth.nii": "",
            "holes.nii": f"{np.isnan(holes).sum():,} voxels are NaN: set to 0",
            "ringing.nii": "32 voxels are negative: set to 0", "lying.nii": "qform used"}
    for name, words in said.items():
        found, printed = segment(tmp_path, capsys, tmp_path / name)
        assert np.array_equal(found.dataobj, expected), name
        assert np.allclose(found.affine, AFFINE, atol=1e-4) and words in printed
        assert printed.count(f"{tmp_path}/{name}: ") == bool(words), printed


def test_scans_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    network(tmp_path / "net.pt")
    brain = head()
    brain[brain > 0] = (brain[brain > 0] - brain[brain > 0].mean()) / brain[brain > 0].std()
    infinite = head()
    infinite[3, 3, 3] = np.inf
    scans = {"zscored": (brain, "is it normalised already"),
             "infinite": (infinite, "1 voxels are infinite"),
             "empty": (0 * brain, "no voxel above 0"), "nothing": (np.nan * brain, "others NaN"),
             "slice": (head()[:, :, :8], "a side of 8 voxels, under 15")}
    for name, (array, message) in scans.items():
        nib.Nifti1Image(array, AFFINE).to_filename(tmp_path / f"{name}.nii")
        line = mistake("predict", tmp_path / f"{name}.nii", ckpt=tmp_path / "net.pt",
                       out=tmp_path / "x.nii")
        assert message in line and line.count(f"{name}.nii") == 1, line
    (tmp_path / "text.nii").write_text("no scan")
    (tmp_path / "void.nii.gz").write_bytes(b"")
    for name in ("text.nii", "void.nii.gz", "absent.nii", "."):
        line = mistake("predict", tmp_path / name, ckpt=tmp_path / "net.pt", out=tmp_path / "x.nii")
        assert line.count(str(tmp_path)) == 1, line
    assert not (tmp_path / "x.nii").exists()


def test_a_true_label_map_as_users_have_it(tmp_path, capsys):
    """Almost integers are integers; a value that the task does not name is found at once."""
    nib.Nifti1Image(head(), AFFINE).to_filename(tmp_path / "scan.nii")
    truth = (head() > 350).astype(np.uint8)
    scaled = nib.Nifti1Image(truth.astype(np.float64), AFFINE)
    scaled.header.set_data_dtype(np.int16)  # nibabel scales it, and 1 comes back as 0.99998
    scaled.to_filename(tmp_path / "scaled.nii")
    maps = {"plain": truth, "noise": truth * np.float32(0.99999994),
            "nan": np.where(truth, 1, np.nan)}
    for name, array in maps.items():
        nib.Nifti1Image(array, AFFINE).to_filename(tmp_path / f"{name}.nii")
    scores = set()
    for name in (*maps, "scaled"):
        _, printed = segment(tmp_path, capsys, tmp_path / "scan.nii",
                             truth=tmp_path / f"{name}.nii")
        scores.add(printed.split("Dice")[1])
    assert len(scores) == 1 and "0." in scores.pop()

    messages = {3: "holds 3, which the task's labels do not name", 0.5: "0.5 is no integer"}
    for value, message in messages.items():
        odd = (truth * value).astype(np.float32)
        nib.Nifti1Image(odd, AFFINE).to_filename(tmp_path / "odd.nii")
        line = mistake("predict", tmp_path / "scan.nii", ckpt=tmp_path / "net.pt",
                       truth=tmp_path / "odd.nii", out=tmp_path / "x.nii")
        assert message in line and not (tmp_path / "x.nii").exists()


def packed(path, name, content):
    """An archive of one file, of the kind that the path's ending says."""
    member = path.with_name(name)
    member.write_bytes(content)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(member, name)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
            archive.add(member, name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_checkpoint_is_told_with_the_fix(tmp_path):
    safetensors = (60).to_bytes(8, "little") + b'{"w": {"dtype": "F32"}}'.ljust(60) + bytes(40)
    texts = {
        "lfs.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "page.pth": b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>\n",
        "bare.pt": b"\xef\xbb\xbf<HTML>", "s3.ckpt": b'<?xml version="1.0"?><Error>',
        "empty.pt": b"", "answer.pt": b'{"error": "not found"}', "list.ckpt": b"PK is not enough\n",
        "weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "one.npy": b"\x93NUMPY\x01\x00" + bytes(99), "safe.ckpt": safetensors,
        "dicom.pt": bytes(128) + b"DICM" + bytes(99),
        "seven.pt": b"7z\xbc\xaf\x27\x1c" + bytes(99)}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    for name in ("folder.zip", "folder.tar", "folder.tgz"):
        packed(tmp_path / name, "last.pt", b"weights" * 100)
    scan = nib.Nifti1Image(head(), AFFINE)
    scan.to_filename(tmp_path / "scan.nii.gz")
    scan.to_filename(tmp_path / "scan.nii")
    nib.MGHImage(head(), AFFINE).to_filename(tmp_path / "scan.mgz")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name in ("run", "tuned/fold_0", "nothing", "unzipped"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("run/last.pt", "tuned/fold_0/last.pt", "unzipped/data.pkl"):
        (tmp_path / name).write_bytes(b"")

    expected = {
        "lfs.pt": "is a git-lfs pointer: fetch the file itself with git lfs pull",
        "page.pth": "is a web page: the download needs a login", "bare.pt": "is a web page",
        "s3.ckpt": "is a web page", "empty.pt": "is empty: copy or download it again",
        "answer.pt": "is a text file, which begins '{\"error\":", "list.ckpt": "is a text file",
        "weights.h5": "is an HDF5 file", "one.npy": "is an array of numpy", "dicom.pt": "is a scan",
        "safe.ckpt": "is a safetensors file: read it with", "seven.pt": "is an archive: unpack it",
        "folder.zip": "is an archive: unpack it", "folder.tar": "is an archive: unpack it",
        "folder.tgz": "is an archive: unpack it",
        "scan.nii.gz": "is a scan: --ckpt takes a network",
        "scan.nii": "is a scan", "scan.mgz": "is a scan", "script.pt": "is a TorchScript archive",
        "run": "run/last.pt is empty", "tuned": "tuned/fold_0/last.pt is empty",
        "nothing": "is a folder without a last.pt", "unzipped": "that the browser has unpacked",
        "run/last.pt/x": "no checkpoint at"}
    for name, message in expected.items():
        line = mistake("predict", tmp_path / "scan.nii", ckpt=tmp_path / name,
                       out=tmp_path / "x.nii.gz")
        assert message in line, (name, line)
        assert line.count(str(tmp_path / name)) == 1, line


def test_names_that_are_not_utf_8(tmp_path):
    """A folder of a Latin-1 disk: printed with an escape, read and written as any other."""
    folder = os.fsencode(tmp_path) + b"/M\xfcller"
    os.mkdir(folder)
    network(os.fsdecode(folder + b"/net.pt"))
    nib.Nifti1Image(head(), AFFINE).to_filename(tmp_path / "scan.nii")
    os.rename(tmp_path / "scan.nii", folder + b"/scan.nii")
    command = [sys.executable, "predict.py", folder + b"/scan.nii", "--ckpt", folder + b"/net.pt",
               "--overlap", "0", "--out", folder + b"/seg.nii.gz"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "M\\udcfcller/scan.nii" in result.stdout, result.stderr
    assert os.path.exists(folder + b"/seg.nii.gz")
    os.unlink(folder + b"/net.pt")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "M\\udcfcller/net.pt" in result.stderr
    assert "Traceback" not in result.stderr
