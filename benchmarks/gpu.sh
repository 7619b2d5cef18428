#!/bin/sh
# Measure on this machine's GPU what RESULTS.md says of CPUs, in under 8 minutes: each stage, whole iterations, memory,
# the note bank, a timeline, and first whether the GPU computes what a CPU does. Needs no network.
#
#     sh benchmarks/gpu.sh [FOLDER]      the results: FOLDER/gpu.json, FOLDER/timeline.json (default: gpu-results)
#
# PYTHON                the interpreter (default: .venv/bin/python if it is there, else python3)
# SMART_PEER_PYTHON     that of an environment made from peers/requirements.txt: also compare with TRL
# SOUNDFONT             path or short name (default: timgm)
# SMALL=1               small sizes on the CPU, to see that it runs; without the two parts that have no small size
set -u
here=$(dirname "$0")
out=${1:-gpu-results}
mkdir -p "$out" || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
font=${SOUNDFONT:-timgm} patience=
HF_HUB_OFFLINE=1 PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE PYTHONPATH
rm -f "$out"/*.json "$out"/*.log

# measure NAME SECONDS COMMAND...: one step, ended after so many seconds (480 in all); if it fails, the others still run
measure() {
    name=$1 limit=${patience:-$2}
    shift 2
    echo "$name ..."
    timeout "$limit" "$python" "$@" > "$out/$name.log" 2>&1 || echo "$name failed ($?): see $out/$name.log" >&2
}

if [ "${SMALL:-}" ]; then
    device=cpu patience=600 tiny="--layers 2 --hidden 32 --heads 2 --intermediate 48 --tokens 8"
    sampler="$tiny --rows 4 --group-size 2 --repeats 1" learner="$tiny --rows 4 --micro 4 --rounds 1"
    render="--clips 2 --rounds 1 --workers 1"
    run="--config quickstart.toml --iterations 1 --set grpo.prompts=2 --set grpo.group_size=2
        --set sampling.max_new_tokens=24 --set render.workers=1 --set render.seconds=2"
    peer="--config paper.toml --iterations 1 --set grpo.prompts=2 --set grpo.group_size=2
        --set sampling.max_new_tokens=24 --set render.workers=1"
else
    device=cuda
    sampler="--repeats 3" learner="--micro 16 64 --rounds 3"
    render="--clips 64 --rounds 2 --workers 1,$(nproc)"
    run="--config paper.toml --iterations 3" peer="--config paper.toml --iterations 2"
    measure doctor 90 -m smart.doctor --gpu --set render.soundfont="$font"
    grep '^{' "$out/doctor.log" | tail -n 1 > "$out/doctor.json"
    measure reward 50 "$here/reward.py" --device $device --clips 16 --rounds 2 --json "$out/reward.json"
fi
# word splitting is wanted: each variable holds several options
measure sampler 40 "$here/sampler.py" --device $device $sampler --json "$out/sampler.json"
measure render 60 "$here/render.py" --bank $device --soundfont "$font" $render --json "$out/render.json"
measure learner 40 "$here/learner.py" --device $device $learner --json "$out/learner.json"
measure iteration 60 "$here/iteration.py" --device $device $run --random-weights --set render.soundfont="$font" \
    --timeline "$out/timeline.json" --json "$out/iteration.json"
if [ "${SMART_PEER_PYTHON:-}" ]; then
    measure peer 140 "$here/iteration.py" --device $device $peer --random-weights --set render.soundfont="$font" \
        --rounds 1 --peer "$SMART_PEER_PYTHON" --json "$out/peer.json"
fi
"$python" "$here/gather.py" "$out"
