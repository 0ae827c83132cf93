#!/usr/bin/env bash
# clipmill on a machine with an NVIDIA GPU: does it run there, is it right, is it fast? Ten minutes or so; more with
# TensorRT, which builds an engine for each shape that it meets.
#
#   pip install -e '.[export,datasets,cuda]'      and '.[tensorrt]' for the TensorRT steps
#   bash benchmarks/gpu_acceptance.sh             PYTHON=python3.12 bash ... for another interpreter
#
# Each step says what it expects, and the first that fails ends the script. Everything goes into gpu_report.md in the
# current folder; send that file, whatever it says. Bundles and runs lie in gpu_acceptance/, which may be deleted.
# Fetches openai/clip-vit-base-patch32 (600 MB) and CIFAR-100 (169 MB) unless they are there.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
report=$PWD/gpu_report.md
work=$PWD/gpu_acceptance

main() {
  printf '# clipmill on a GPU\n\nNot finished: see the last step below.\n' > "$report"
  cd "$root"

  step "The machine" "a processor, library versions, and nvidia-smi's table of GPUs" machine
  step "The providers" "'comes up' after cuda, and after tensorrt where that is installed" providers
  local provider missing bundles=() providers=(cuda)
  if missing=$(comes_up tensorrt 2>&1); then
    providers+=(tensorrt)
  else
    say "TensorRT's steps are left out: $missing"
  fi

  for provider in "${providers[@]}"; do
    step "Export for $provider" "min cosines of 0.999 or more, and no word of a certificate made on the CPU" \
      "$python" cli.py export --provider "$provider" --output "$work/$provider"
    step "Where that certificate was made" "on $provider" certified_on "$provider"
    step "Extract CIFAR-100 on $provider" \
      "10000 embeddings, 0 rejects, and which stage bound the run; on tensorrt, minutes of building an engine first" \
      "$python" cli.py extract --dataset cifar100 --provider "$provider" --model "$work/$provider" \
      --output "$work/cifar100-$provider" --overwrite
    step "Zero-shot on that" "an accuracy of about 0.62" "$python" cli.py probe zero-shot \
      --test "$work/cifar100-$provider" --template "a photo of a {}" --model "$work/$provider" --provider "$provider"
    bundles+=("$work/$provider")
  done
  step "Throughput" "clipmill ahead of transformers fp16, and near its forward alone" \
    "$python" benchmarks/gpu_throughput.py "${bundles[@]}"

  sed -i.old 's/^Not finished: .*/All steps passed./' "$report" && rm "$report.old"
  say "Done. All of it is in $report"
}

# step TITLE EXPECTATION COMMAND...: run it, on the screen and in the report; end the script if it fails
step() {
  local title=$1 expected=$2
  shift 2
  printf '\n== %s\n   expect: %s\n' "$title" "$expected"
  # shellcheck disable=SC2016 # the backticks are Markdown's
  printf '\n## %s\n\nExpected: %s.\n\n`%s`\n\n```\n' "$title" "$expected" "$*" >> "$report"
  local status=0
  "$@" 2>&1 | tee -a "$report" || status=$?
  printf '```\n' >> "$report"
  if ((status)); then
    say "FAILED at: $title. See $report"
    exit 1
  fi
}

say() {
  printf '\n%s\n' "$1" | tee -a "$report"
}

machine() {
  PYTHONPATH=$root/benchmarks:$root "$python" -c '
from machine_card import machine_card
for name, value in machine_card().items():
    print(f"{name:<16} {value}")'
  nvidia-smi 2> /dev/null || echo "nvidia-smi does not run"
}

providers() {
  "$python" cli.py providers && comes_up cuda
}

# comes_up PROVIDER: succeeds, or says what is missing
comes_up() {
  "$python" cli.py providers --json |
    "$python" -c 'import json, sys; sys.exit(json.load(sys.stdin)["providers"][sys.argv[1]])' "$1"
}

# `export` makes the certificate on the provider itself if that comes up, else on the CPU, with a caveat that says why
certified_on() {
  "$python" - "$work/$1/bundle.json" "$1" << 'EOF'
import json, sys
certificate = json.load(open(sys.argv[1], encoding="utf-8"))["certificate"]
print(json.dumps(certificate, indent=2))
sys.exit(None if certificate["provider"] == sys.argv[2] else certificate["caveat"])
EOF
}

main
