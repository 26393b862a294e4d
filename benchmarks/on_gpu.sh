#!/usr/bin/env bash
# Everything that needs a GPU, unattended: tests, tables, tuning. Logs and JSON go to DIR.
#   benchmarks/on_gpu.sh DIR [STAGE...]     all stages, or those whose names begin so, in the order they are given:
#   cuda-build cuda throughput plan profile tune sanity training-step tests sanitizer
# Where the GPU is lent for minutes, name them: all take an hour. Without cuda-build a fresh copy has no 'cuda'.
set -uo pipefail
out=$(realpath -m "${1:?usage: $0 DIR [STAGE...]}")
export PACL_GPU_BEGIN=${PACL_GPU_BEGIN:-$(date +%s)}
if (($# > 2)); then
  for stage in "${@:2}"; do "$0" "$out" "$stage"; done
  exit
fi
only=${2:-}
mkdir -p "$out"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
parallel=$($python -c "import xdist" 2>/dev/null && echo "-n 12")  # the tests wait for compilers, not for the GPU
run() { # name, then a command under a limit of seconds; what it printed is kept, failure does not stop the rest
  local name=$1 limit=$2
  shift 2
  [[ $name == "$only"* ]] || return 0
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $(($(date +%s) - PACL_GPU_BEGIN)) s so far; $(tail -n 1 "$out/$name.log")"
}
# Each tensor in an allocation of its own: in a block that torch's allocator shares out, reading past one is reading another.
sanitize() { # name, limit, tool, what to test
  run "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$3" --error-exitcode 1 \
    $python -m pytest -q -x -p no:cacheprovider "${@:4}"
}

nvidia-smi >"$out/nvidia-smi.log" 2>&1
# The module for this machine; without it the 'cuda' backend is absent and its tests skip.
run cuda-build 400 env PACL_CUDA=ON $python setup.py build_ext --inplace
run cuda-small 120 $python -m pytest -q -x $parallel -p no:cacheprovider -m hopper tests/kernels \
  -k "small or (shapes and N196) or (in_memory and N441)"
run cuda-tune 150 $python benchmarks/tune_cuda.py --json "$out/cuda-tune.json"
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
run sanity 120 $python -m pytest -q -x -p no:cacheprovider -m gpu \
  tests/kernels/test_backends.py tests/kernels/test_streams.py -k "auto_takes_the_fastest or never_waits or graph"
for tool in memcheck racecheck; do
  sanitize "cuda-$tool" 200 $tool -m hopper tests/kernels/test_accuracy.py -k small
done
run tune 300 $python benchmarks/tune_triton.py --repeats 5 --json "$out/tune.json"
run training-step 200 $python benchmarks/training_step.py --device cuda --json "$out/training-step.json"
run tests 900 $python -m pytest -q $parallel -p no:cacheprovider -m gpu --maxfail=40 \
  --continue-on-collection-errors
# On a GPU where there is one; no row of theirs is marked so.
run tests-triton 300 $python -m pytest -q $parallel -p no:cacheprovider --maxfail=20 \
  tests/kernels/test_triton.py tests/kernels/test_packed_triton.py tests/kernels/test_triton_lists.py tests/kernels/test_upsample.py -k triton
for shape in "256 196 512" "4096 196 768" "4096 256 1024" "2048 576 768"; do
  read -r batch patches dim <<<"$shape"
  run "throughput-$batch-$patches-$dim" 240 $python benchmarks/throughput.py --device cuda --dtype bfloat16 \
    --batch "$batch" --patches "$patches" --dim "$dim" --repeats 5 --json "$out/throughput-$batch-$patches-$dim.json"
done
sanitize sanitizer 300 memcheck tests/kernels/test_triton.py -k "compatibility and (N65 or N49)"
