#!/usr/bin/env bash
# bash launch/compile_table.sh [FOLDER=results/compile_tpu]: the README's table of what fits which pod. No TPU is needed;
# about 90 minutes on 2 cores. Each line below is compiled by `python -m tto_jax.compile_tpu` into FOLDER/NAME.jsonl, which
# is left alone if it is there: remove it to compile it again. Then the table is printed.
set -euo pipefail
export EXTRAS=test # with libtpu
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
folder=${1:-results/compile_tpu}
mkdir -p "$folder"
status=0
while read -r config topology mesh; do
  name=$folder/$config,${topology/:/-}.jsonl
  [ ! -e "$name" ] || continue
  .venv/bin/python -m tto_jax.compile_tpu "--config=configs/$config.py" "--topology=$topology" "--mesh=$mesh" \
    "--json=$name.tmp" </dev/null || status=1
  [ ! -e "$name.tmp" ] || mv "$name.tmp" "$name"
done <<'POINTS'
brpo_r1_qwen_1p5b_8k v5e:8x8 1,64,1
brpo_r1_qwen_1p5b_8k v6e:4x4 1,16,1
brpo_r1_qwen_1p5b_8k v5p:4x4x4 1,64,1
grpo_r1_qwen_1p5b_8k v5e:8x8 1,64,1
brpo_r1_qwen_1p5b_16k v5e:8x8 1,16,4
brpo_r1_qwen_1p5b_16k v6e:4x4 1,16,1
brpo_r1_qwen_1p5b_16k v5p:4x4x4 1,64,1
brpo_r1_qwen_7b_8k v5e:16x16 1,64,4
brpo_r1_qwen_7b_8k v5p:4x4x4 1,64,1
POINTS
.venv/bin/python -m tto_jax.compile_tpu "--table=$folder"
exit "$status"
