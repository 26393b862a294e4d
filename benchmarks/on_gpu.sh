#!/usr/bin/env bash
# Everything that needs a GPU, unattended, in order of worth: tests, tables, tuning. Logs and JSON go to DIR, and at the
# end into DIR.tar.gz.
#   benchmarks/on_gpu.sh DIR [STAGE...]       all stages, or those whose names begin so, in the order they are given:
#   cuda-build cuda-new experiments combinations throughput sanitizer large plan profile cuda tests training-step
#   end-to-end sweep tune
#   benchmarks/on_gpu.sh --dry-run [STAGE...] lists the commands and checks that each parses; so it is without a GPU
#   benchmarks/on_gpu.sh --list [STAGE...]    lists them in columns: name, limit in seconds, command
# A stage that has passed is left out when DIR is used again. Where the GPU is lent for minutes, the first stages, up to
# the tables, take about ten; all take an hour. Without cuda-build a fresh copy has no 'cuda'.
set -uo pipefail
usage="usage: $0 DIR|--dry-run|--list [STAGE...]"
python=${PYTHON:-python3}
dry=
if [[ ${1:?$usage} == --* ]] || ! nvidia-smi >/dev/null 2>&1; then dry=1; fi
out=DIR
[[ $1 == --* ]] || out=$(realpath -m -- "$1")
stages=("${@:2}")
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
if [[ $dry ]]; then
  parallel="-n 12"
else
  mkdir -p "$out"
  nvidia-smi >"$out/nvidia-smi.log" 2>&1
  begin=$(date +%s)
  parallel=$($python -c "import xdist" 2>/dev/null && echo "-n 12") # the tests wait for compilers, not for the GPU
fi

run() { # name, then a command under a limit of seconds; what it printed is kept, failure does not stop the rest
  local name=$1 limit=$2
  shift 2
  [[ $name == "$only"* ]] || return 0
  if [[ $dry ]]; then
    printf '%s\t%s\t' "$name" "$limit" && printf '%q ' "$@" && echo
    return
  fi
  [[ ! -e $out/$name.passed ]] || return 0
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  ((code)) || touch "$out/$name.passed"
  echo "$name: exit $code, $(($(date +%s) - begin)) s so far; $(tail -n 1 "$out/$name.log")"
}
# Each tensor in an allocation of its own: in a block that torch's allocator shares out, reading past one is reading another.
sanitize() { # name, limit, tool, what to test
  run "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$3" --error-exitcode 1 \
    $python -m pytest -q -x -p no:cacheprovider "${@:4}"
}

all() {
  # The module for this machine; without it the 'cuda' backend is absent and its tests skip.
  run cuda-build 400 env PACL_CUDA=ON $python setup.py build_ext --inplace
  run cuda-new 120 $python -m pytest -q -x $parallel -p no:cacheprovider -m hopper tests/kernels -k "transposed or small"
  run experiments 120 $python benchmarks/cuda_experiments.py --json "$out/experiments.json"
  run combinations 180 $python benchmarks/cuda_switches.py --json "$out/combinations.json"
  # Half the time goes into torch.compile, and nothing is written before the end.
  for form in dot cosine max; do
    run "throughput-$form" 240 $python benchmarks/throughput.py --device cuda --dtype bfloat16 --form $form \
      --batch 4096 --repeats 7 --json "$out/throughput-bfloat16-$form.json"
  done
  # In one pass where an image fits a tile; its ratio to the same step of InfoNCE is what that buys.
  for form in dot cosine; do
    run "throughput-sigmoid-$form" 240 $python benchmarks/throughput.py --device cuda --dtype bfloat16 --form $form \
      --loss sigmoid --batch 4096 --repeats 7 --json "$out/throughput-sigmoid-$form.json"
  done
  for tool in memcheck racecheck; do
    sanitize "sanitizer-cuda-$tool" 200 $tool -m hopper tests/kernels/test_accuracy.py -k small
  done
  run large 120 $python benchmarks/throughput.py --device cuda --dtype bfloat16 --batch 32768 --backend cuda \
    --peers none --repeats 3 --json "$out/throughput-32768.json"
  # The calibration of this GPU, beside the measured steps of the same shape.
  for form in dot cosine max; do
    run "plan-$form" 60 $python -m pacl_kernels plan --device cuda --form $form --batch 4096
  done
  for form in dot cosine; do
    for backend in cuda triton; do
      run "profile-$backend-$form" 60 $python benchmarks/profile_step.py --backend $backend --form $form \
        --json "$out/profile-$backend-$form.json"
    done
    run "profile-sigmoid-$form" 60 $python benchmarks/profile_step.py --backend cuda --form $form --loss sigmoid \
      --json "$out/profile-sigmoid-$form.json"
    # How busy the tensor cores are; fewer images, since each launch is run several times.
    run "profile-pipes-$form" 90 ncu --clock-control none --section ComputeWorkloadAnalysis --kernel-name regex:score_kernel \
      $python benchmarks/profile_step.py --once --backend cuda --form $form --batch 1024
  done
  run cuda-tests 400 $python -m pytest -q $parallel -p no:cacheprovider -m hopper tests/kernels --maxfail=20
  run cuda-tune 150 $python benchmarks/tune_cuda.py --json "$out/cuda-tune.json"
  run cuda-sanity 120 $python -m pytest -q -x -p no:cacheprovider -m gpu \
    tests/kernels/test_backends.py tests/kernels/test_streams.py -k "auto_takes_the_fastest or never_waits or graph"
  run tests 900 $python -m pytest -q $parallel -p no:cacheprovider -m gpu --maxfail=40 \
    --continue-on-collection-errors
  # On a GPU where there is one; no row of theirs is marked so.
  run tests-triton 300 $python -m pytest -q $parallel -p no:cacheprovider --maxfail=20 \
    tests/kernels/test_triton.py tests/kernels/test_packed_triton.py tests/kernels/test_triton_lists.py \
    tests/kernels/test_upsample.py -k triton
  run training-step 200 $python benchmarks/training_step.py --device cuda --json "$out/training-step.json"
  run end-to-end 200 $python benchmarks/end_to_end.py --device cuda --json "$out/end-to-end.json"
  run sweep 700 $python benchmarks/throughput.py --device cuda --dtype bfloat16 --batch 4096 --sweep "$out/sweep.json" \
    --minutes 10
  run tune 300 $python benchmarks/tune_triton.py --repeats 5 --json "$out/tune.json"
  for shape in "256 196 512" "4096 196 768" "4096 256 1024" "2048 576 768"; do
    read -r batch patches dim <<<"$shape"
    run "throughput-$batch-$patches-$dim" 240 $python benchmarks/throughput.py --device cuda --dtype bfloat16 \
      --batch "$batch" --patches "$patches" --dim "$dim" --repeats 5 --json "$out/throughput-$batch-$patches-$dim.json"
  done
  sanitize sanitizer-triton 300 memcheck tests/kernels/test_triton.py -k "compatibility and (N65 or N49)"
}

chosen() { # all stages, or those that are named
  for only in "${stages[@]:-}"; do all; done
}

if [[ $1 == --list ]]; then
  chosen
elif [[ $dry ]]; then
  chosen | $python benchmarks/check_commands.py
else
  chosen
  tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
fi
