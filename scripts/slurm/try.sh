#!/bin/bash
# Tries train.sbatch on a real SLURM of one node, on this machine: an operator's signal, a requeue from outside, the time
# limit, and then that the result is bitwise that of a run which nobody disturbed. Needs root, and on Debian
#   apt-get install slurmctld slurmd slurm-client munge
# Everything lies in a folder of its own and is stopped at the end; a SLURM that is there already is left alone.
# Usage: scripts/slurm/try.sh [FOLDER]        PYTHON names the interpreter that has llmkit. About five minutes.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
HERE=$PWD
TRY=$(mkdir -p "${1:-/tmp/llmkit-slurm}" && cd "${1:-/tmp/llmkit-slurm}" && pwd) || exit 1
export PYTHON=${PYTHON:-$HERE/.venv/bin/python} SLURM_CONF=$TRY/slurm.conf OMP_NUM_THREADS=1
RUN=$TRY/run QUIET=$TRY/quiet STATE=$TRY/state
PIDS=()

fail() { echo "FAILED: $*"; exit 1; }
for tool in munged slurmctld slurmd sbatch srun; do
  command -v "$tool" >/dev/null || fail "$tool is not installed: see the head of this file"
done
[ "$(id -u)" = 0 ] || fail "SLURM's daemons need root"

stop() {
  if [ -n "$JOB" ]; then
    scancel "$JOB" 2>/dev/null
    for _ in $(seq 40); do [ -z "$(squeue --noheader --jobs="$JOB" 2>/dev/null)" ] && break; sleep 0.5; done
  fi
  for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null; done
  wait
}

rm -rf "$RUN" "$QUIET" "$STATE" "$TRY/job.log"
mkdir -p "$STATE/ctld" "$STATE/d"
JOB=
trap stop EXIT

# --- a cluster of one node ---------------------------------------------------------------------------------------------
dd if=/dev/urandom of="$TRY/munge.key" bs=128 count=8 2>/dev/null
chmod 600 "$TRY/munge.key"
CPUS=$(nproc --all)
cat >"$SLURM_CONF" <<EOF
ClusterName=try
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$TRY/munge.socket
CryptoType=crypto/munge
SlurmctldPort=$((20000 + $$ % 5000))
SlurmdPort=$((25000 + $$ % 5000))
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldLogFile=$TRY/slurmctld.log
SlurmdLogFile=$TRY/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=60
JobRequeue=1
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$CPUS State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
munged --foreground --force --key-file="$TRY/munge.key" --socket="$TRY/munge.socket" --pid-file="$STATE/munged.pid" \
  --seed-file="$STATE/munged.seed" --log-file="$STATE/munged.log" 2>"$STATE/munged.err" &
PIDS+=($!)
for _ in $(seq 50); do [ -S "$TRY/munge.socket" ] && break; sleep 0.1; done
slurmctld -D >/dev/null 2>&1 &
PIDS+=($!)
slurmd -D >/dev/null 2>&1 &
PIDS+=($!)
for _ in $(seq 100); do sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break; sleep 0.3; done
sinfo --noheader --format=%T | grep -q idle || fail "the node is not idle: see $TRY/slurmctld.log and slurmd.log"
echo "SLURM $(sinfo --version | cut -d' ' -f2): a node of $CPUS processors is idle"

# --- a run of about two minutes on two ranks, and the same undisturbed ----------------------------------------------------
"$PYTHON" - "$TRY" <<'EOF'
import random, sys
pick = random.Random(0)
words = ["".join(pick.choice("abcdefghij") for _ in range(pick.randint(2, 7))) for _ in range(60)]
with open(f"{sys.argv[1]}/text.txt", "w") as f:
    f.write("\n\n".join(" ".join(pick.choice(words) for _ in range(pick.randint(3, 60))) for _ in range(200)))
EOF
cat >"$TRY/recipe.yaml" <<EOF
stage: pretrain
out: $RUN
tokenizer: {kind: byte}
data: {path: $TRY/text.txt, valid_frac: 0.1, cache_dir: $TRY/cache}
model: {n_layers: 2, n_heads: 4, d_model: 128, max_seq_len: 64, dropout: 0.1}
batch: {tokens_per_step: 512, micro_tokens: 128}
steps: ${STEPS:-2400}
eval: {every: 500}
save: {every: 500, keep: 2}
log: {every: 200, tensorboard: false, plot: false}
device: cpu
EOF
PROCESSES=2 SAVE_S=50 MAX_REQUEUES=9 sbatch --parsable --nodes=1 --gpus-per-node=0 --cpus-per-task=2 --time=3 \
  --signal=USR1@60 --output="$TRY/job.log" scripts/slurm/train.sbatch "$TRY/recipe.yaml" >"$TRY/job.id" || fail "sbatch"
JOB=$(cat "$TRY/job.id")

step() { tail -n 1 "$RUN/metrics.jsonl" 2>/dev/null | grep -oE '"step": [0-9]+' | grep -oE '[0-9]+' || echo 0; }
state() { squeue --noheader --jobs="$JOB" --format=%T 2>/dev/null; }
report() { grep -E "^(started|resumed|stopped by|job $JOB|slurmstepd|srun|warning)|CANCELLED" "$TRY/job.log" | tail -n "${1:-4}"; }
until_step() { # steps of this life of the job
  local goal=$(($(step) + $1))
  for _ in $(seq 900); do
    [ "$(step)" -ge "$goal" ] && return
    [ -e "$RUN/DONE" ] && fail "the run was finished before it could be disturbed: give more STEPS"
    sleep 0.2
  done
  fail "no step $goal: see $TRY/job.log"
}
requeued() { # waits until the job is pending, and lets it start at once instead of after SLURM's two minutes
  local before=$1 began=$SECONDS
  for _ in $(seq 400); do
    [ "$(state)" = PENDING ] && break
    sleep 0.3
  done
  [ "$(state)" = PENDING ] || fail "not requeued after $before: $(report)"
  [ -e "$RUN/PREEMPTED" ] || fail "no PREEMPTED after $before: see $TRY/job.log"
  echo "$before at step $(step): saved and requeued (waited $((SECONDS - began)) s for it)"
  sleep 5 # a job that starts in the second in which it ended is refused: its credential has just been revoked
  scontrol update JobId="$JOB" StartTime=now
  for _ in $(seq 400); do
    [ "$(state)" = RUNNING ] && return
    sleep 0.3
  done
  fail "not started again: see $TRY/slurmctld.log"
}

until_step 200
scancel --signal=USR1 "$JOB"
requeued "scancel --signal=USR1"
until_step 200
scontrol requeue "$JOB"
requeued "scontrol requeue"
until_step 200
scontrol update JobId="$JOB" TimeLimit=2
requeued "the time limit, 60 s before its end"
for _ in $(seq 1500); do
  [ -e "$RUN/DONE" ] && break
  [ "$(state)" = PENDING ] && requeued "the time limit once more"
  sleep 0.3
done
[ -e "$RUN/DONE" ] || fail "not finished: $(report 9)"
for _ in $(seq 100); do [ -z "$(state)" ] && break; sleep 0.3; done
echo "finished at step $(step); job $(scontrol show job "$JOB" | grep -oE 'JobState=\w+|Restarts=[0-9]+' | tr '\n' ' ')"

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node=2 scripts/train.py "$TRY/recipe.yaml" out="$QUIET" \
  >"$TRY/quiet.log" 2>&1 || fail "the undisturbed run: see $TRY/quiet.log"
same() { [ "$(sha256sum <"$RUN/$1")" = "$(sha256sum <"$QUIET/$1")" ] || fail "$1 differs from the undisturbed run's"; }
LAST=$(basename "$(ls -d "$RUN"/checkpoints/step-* | tail -n 1)")
for file in metrics.jsonl "checkpoints/$LAST/model.safetensors" "checkpoints/$LAST/trainer_state/optimizer.safetensors"; do
  same "$file"
done
echo "bitwise equal to an undisturbed run: metrics.jsonl, weights and optimizer of $LAST"
