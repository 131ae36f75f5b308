#!/usr/bin/env bash
# All that docs/results.md and docs/inductor.md say of a GPU, measured again, each call in nine minutes on a machine with
# 16 cores:
#
#     bash benchmarks/gpu_session.sh OUT           all parts but the last
#     bash benchmarks/gpu_session.sh OUT PART...   some of them
#
# figures: latency and error, gpu.json, undisturbed where it is the only part. tables: by steps and by cameras,
# gpu_tables.json. packages: the small model as a package, in one and in two parts, and as a graph that torch runs, each
# compared with float32, packages.json. bench: `pi05c bench` of these, bench.json and bench.html. tests: those that a GPU
# tells more. passes: the table by pass, gpu_passes.json.
#
# OUT gets these files and log.txt, whose last line names the parts that failed. SCRATCH is where 25 GB of graphs lie
# meanwhile; WHEELS a folder of packages to install first, for a machine without a network; PYTHON the interpreter; LIMIT
# the seconds after which everything ends. CONFIG=pi05_tiny DEVICE=cpu tries it without a GPU.
set -u
out=$(realpath -m "${1:?name a folder for the results}")
shift
parts=" ${*:-figures tables packages bench tests} "
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
config=${CONFIG:-pi05_libero}
device=${DEVICE:-cuda}
runs=100
[ "$device" = cuda ] || runs=3
scratch=$(realpath -m "${SCRATCH:-${TMPDIR:-/tmp}/pi05c-gpu}")
limit=${LIMIT:-540}
log=$out/log.txt
mkdir -p "$out" "$scratch"
: >"$log"
rm -f "$scratch/failed"
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}  # of each of ten processes
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PI05C_CACHE="$scratch/cache"
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

# Runs a command until the time is up; its output goes to the log, its name to `failed` if it fails.
step() {
    local name=$1 start=$SECONDS status
    shift
    timeout -k 5 "$((limit > SECONDS ? limit - SECONDS : 1))" "$@" 2>&1 | sed -u "s/^/[$name] /" | tee -a "$log"
    status=${PIPESTATUS[0]}
    echo "[$name] exit status $status after $((SECONDS - start)) s, at $SECONDS s" | tee -a "$log"
    [ "$status" = 0 ] || echo "$name" >>"$scratch/failed"
}

wanted() { [[ $parts == *" $1 "* ]]; }

packages() {
    local small=$scratch/small name
    rm -rf "$small"
    mkdir -p "$small"
    "$python" -m pi05c export --random --config pi05_tiny -o "$small/model.onnx" || return
    for name in package parts graph; do
        package "$name" &
    done
    wait
    "$python" - "$small" "$out/packages.json" "$device" <<'END'
import json
import sys
from pathlib import Path

small, out, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
made = {path.stem: path.read_text() for path in small.glob("*.json")}
found = {name: json.loads(text) for name, text in made.items() if text}
out.write_text(json.dumps(found, indent=1) + "\n")
for name in ("package", "parts", "graph")[: 3 if device == "cuda" else 2]:
    if not (name in found and found[name]["passed"] and found[name]["ran"]):
        sys.exit(f"{name} did not run, or is beyond its limit")
END
}

package() {
    local options=(--backend inductor)
    [ "$1" = parts ] && options+=(--split vision+prefix,step)
    [ "$1" = graph ] && options=(--backend onnxruntime)
    "$python" -m pi05c "$small/model.onnx" --passes default "${options[@]}" -o "$small/$1" &&
        flock --shared "$scratch/lock" "$python" -m pi05c verify "$small/$1" --json >"$small/$1.json"
}

export -f package packages
export python scratch out device
measure=(--scratch "$scratch" --config "$config" --device "$device")
waiting=()
if wanted figures; then
    step figures "$python" benchmarks/gpu.py "$out" "${measure[@]}" &
    waiting+=($!)
fi
if wanted packages; then
    step packages bash -c packages &
    waiting+=($!)
fi
if wanted tests; then
    step tests flock --shared "$scratch/lock" "$python" -m pytest -p no:cacheprovider -rs -m gpu \
        tests/backend tests/driver/test_runtime.py &
fi
if wanted tables || wanted passes; then
    while wanted figures && kill -0 "${waiting[0]}" && [ "$(cat "$scratch/exported" 2>/dev/null)" != "$config" ]; do
        sleep 1
    done
fi
if wanted tables; then
    step tables "$python" benchmarks/gpu_tables.py "$out" "${measure[@]}" --only views "pass 14" &
fi
[ ${#waiting[@]} = 0 ] || wait "${waiting[@]}"
if wanted bench; then
    folders=()
    for name in package parts graph; do
        [ -e "$scratch/small/$name/manifest.json" ] && folders+=("$scratch/small/$name")
    done
    step bench flock "$scratch/lock" "$python" -m pi05c bench "${folders[@]}" --baseline torch-eager \
        --baseline torch-compile --runs "$runs" -o "$out/bench.json" -o "$out/bench.html"
fi
wait
if wanted passes; then
    step passes "$python" benchmarks/gpu_tables.py "$scratch/passes" "${measure[@]}" \
        --only "pass 0" "pass 10" "pass 11" "pass 12" "pass 13"
    cp "$scratch/passes/gpu_tables.json" "$out/gpu_passes.json"
fi
echo "failed: $(sort -u "$scratch/failed" 2>/dev/null | xargs)" | tee -a "$log"
[ ! -e "$scratch/failed" ]
