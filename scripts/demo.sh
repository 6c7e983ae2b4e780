#!/bin/sh
# From nothing to a report in about two minutes: real handwritten digits, every core of this machine.
set -eu

run_dir="runs/demo"
if [ -e "$run_dir" ]; then
    run_dir="runs/demo-$(date +%Y%m%d-%H%M%S)"
fi
started=$(date +%s)

echo "== train: ShuffleNet V2 0.5x on scikit-learn's handwritten digits"
meshuffle train digits --config recipes/digits.toml --out "$run_dir"

# Export needs most of its time for imports and tracing: it runs beside the next two.
export_log=$(mktemp)
trap 'rm -f "$export_log"' EXIT
meshuffle export "$run_dir" --to onnx >"$export_log" 2>&1 &
export_process=$!

echo "== evaluate the best weights on the test split, which selected nothing"
meshuffle eval "$run_dir"

echo "== predict six test images"
python scripts/write_digits.py "$run_dir/images"
meshuffle predict "$run_dir" "$run_dir/images"

echo "== export to ONNX and compare with PyTorch on batches of 1, 2 and 5"
status=0
wait $export_process || status=$?
cat "$export_log"
[ $status -eq 0 ] || exit $status

echo "== done in $(($(date +%s) - started)) s; open the report in a browser:"
echo "$(pwd)/$run_dir/report.html"
