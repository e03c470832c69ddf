#!/usr/bin/env bash
#
# Runs every fuzz target of this module, each for as long as the argument says
# (Go's -fuzztime, such as 10s).
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT

packages=$(go list ./...)
for package in $(grep -v '/integration' <<<"$packages"); do
	targets=$(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true)
	for target in $targets; do
		echo "fuzz: ${package#*/stasis/} $target"
		# Without the last flag, a short run is spent on making new inputs small.
		if ! go test -run '^$' -fuzz "^$target\$" -fuzztime "$1" -fuzzminimizetime 10x "$package" >"$log" 2>&1; then
			# Go sometimes takes the end of the time for a failure
			# (golang/go#75804). A real one leaves an input.
			if grep -q 'context deadline exceeded' "$log" && ! grep -q 'Failing input written' "$log"; then
				continue
			fi
			cat "$log" >&2
			exit 1
		fi
	done
done
