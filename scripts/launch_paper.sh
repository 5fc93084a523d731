#!/usr/bin/env bash
# The paper's row "ours" of Table 2 on M3ED: every stage, then responses and scores (§4.3: four A100 40G, batch 16).
#
#   M3ED=/data/M3ED M3ED_VIDEOS=/data/M3ED/videos CHATGLM2=/weights/chatglm2-6b VISUALGLM=/weights/visualglm-vision \
#     scripts/launch_paper.sh [key=value …]
#
# Run it again after a break: what is finished is reused, what was interrupted resumes.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: M3ED=DIR M3ED_VIDEOS=DIR CHATGLM2=DIR VISUALGLM=DIR scripts/launch_paper.sh [key=value …]

  M3ED         folder with annotation.json
  M3ED_VIDEOS  folder with {show}/{dialogue}.mp4
  CHATGLM2     ChatGLM2-6B as scripts/convert_chatglm2.py writes it
  VISUALGLM    VisualGLM's vision tower as scripts/convert_visualglm.py writes it
  GPUS         how many to use (4); the global batch is 16 whatever their number
  WAY          ddp (default), or fsdp where one GPU cannot hold the model
  PYTHON       the interpreter that ELMD is installed for (python)

  key=value    any setting of python -m elmd.train, as retriever.path=/weights/m3e-base or runs_dir=/scratch/runs
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 1
}

case "${1:-}" in
  -h | --help) usage && exit 0 ;;
esac

for name in M3ED M3ED_VIDEOS CHATGLM2 VISUALGLM; do
  if [[ -z "${!name:-}" ]]; then
    usage
    fail "$name is not set; give it a folder as shown above."
  fi
  [[ -d "${!name}" ]] || fail "$name: there is no folder ${!name}; correct the path."
done

gpus=${GPUS:-4}
way=${WAY:-ddp}
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || fail "GPUS: '$gpus' is no number of GPUs; set it to 1 or more."
[[ "$way" == ddp || "$way" == fsdp ]] || fail "WAY: there is no $way; choose ddp or fsdp."
found=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) ||
  fail "$python cannot import torch; activate the environment that ELMD is installed in, or set PYTHON."
((found > 0)) || fail "torch sees no GPU on this machine, and this takes one; run it where nvidia-smi lists some."
((found >= gpus)) || fail "GPUS: $gpus are asked for and this machine has $found; set GPUS=$found."

settings=(
  experiment=table2_m3ed
  data.path="$M3ED" data.video_root="$M3ED_VIDEOS" llm.path="$CHATGLM2" vision.path="$VISUALGLM"
  "$@"
)
launch=("$python" -m accelerate.commands.launch
  --config_file "$root/configs/accelerate/$way.yaml" --num_processes "$gpus")

"$python" -m elmd.doctor "${settings[@]}"
"${launch[@]}" -m elmd.train "${settings[@]}" stage=all
"${launch[@]}" -m elmd.evaluate "${settings[@]}"
