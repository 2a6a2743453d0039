#!/usr/bin/env bash
# Checks out the packs that tests/comfyui/test_other_packs.py tries, at the commits it was written for, into a folder.
set -euo pipefail
folder=${1:?usage: other_packs.sh FOLDER}
take() {
    git init --quiet "$folder/$2"
    git -C "$folder/$2" fetch --quiet --depth 1 "https://github.com/$1/$2" "$3"
    git -C "$folder/$2" checkout --quiet FETCH_HEAD
}
take Kosinkadink ComfyUI-VideoHelperSuite 4ee72c065db22c9d96c2427954dc69e7b908444b
take kijai ComfyUI-KJNodes 3f20054214fec9f9234fd3841ae6f1e4287948f6
take Kosinkadink ComfyUI-AnimateDiff-Evolved d8d163cd90b1111f6227495e3467633676fbb346
