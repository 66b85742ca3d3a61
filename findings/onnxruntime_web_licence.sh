#!/usr/bin/env bash
# onnxruntime-web 1.30.0: the npm package has no licence text.
#
# Guessed: the text of its licence (MIT, whose one condition is that the notice goes along) and the
# notices of what is compiled into its 14 to 28 MB of WebAssembly, as the package for Python has them.
# Seen: neither. package.json names "MIT", and that is all: who puts the files on a web server must
# fetch LICENSE and ThirdPartyNotices.txt from elsewhere (the wheel of onnxruntime holds both).
#
# Output when this was written (onnxruntime-web 1.30.0, onnxruntime 1.32.0):
#     onnxruntime-web: licence MIT, 0 files of licences or notices
#     onnxruntime for Python: 2 files of licences or notices
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm pack --silent onnxruntime-web@1.30.0 > name
tar xzf "$(cat name)"
python3 -m venv venv
venv/bin/pip download --quiet --no-deps --only-binary :all: onnxruntime==1.32.0
count() { grep -icE '(^|/)(licen[cs]e|notice|thirdpartynotices|copying)[^/]*$' || true; }
licence=$(python3 -c 'import json; print(json.load(open("package/package.json"))["license"])')
seen=$(
    echo "onnxruntime-web: licence $licence, $(find package -type f | count) files of licences or notices"
    listed=$(python3 -m zipfile --list onnxruntime-*.whl | sed 's/  .*//' | grep '^onnxruntime/[^/]*$' | count)
    echo "onnxruntime for Python: $listed files of licences or notices"
)
echo "$seen"
expected='onnxruntime-web: licence MIT, 0 files of licences or notices
onnxruntime for Python: 2 files of licences or notices'
if [[ $seen != "$expected" ]]; then
    echo "the packages are other ones now: expected" >&2
    echo "$expected" >&2
    exit 1
fi
echo "as described"
