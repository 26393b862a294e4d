#!/bin/bash
# Train on several machines without a scheduler, and start again from the last checkpoint when a process dies:
#
#   ./elastic.sh node0:29400 4 --train-data 'cc3m-{0000..0331}.tar' --model ViT-B-16 --pretrained openai --name cc3m
#
# Type the same line on all of the 4 machines. They must see the same --log-dir. PROCESSES: processes on each machine,
# by default one for each GPU. RESTARTS: how often the run may start again, by default 10 times.

# torchrun would keep the addresses of the dead processes for the next start, which Gloo then tries to reach.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes "$2" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d --rdzv-endpoint "$1" --rdzv-id pacl \
    -m pacl train --resume latest "${@:3}"
