#!/bin/sh
# Run a recipe, and read the result with jq alone: sh result.sh RECIPE [OPTIONS of llmtune run]
# Writes result.json, prints a summary, and exits with llmtune's code.
code=0
llmtune run "$@" --json >result.json || code=$?
jq -r '
  "verdict: \(.verdict.word // "none")   exit code \(.exit_code)   \(.seconds | floor) s   \(.folder // "no run folder")",
  (.gates[] | "gate \(if .passed then "passed" elif .passed == null then "undecided" else "FAILED" end): \(.name), got \(.got)"),
  (.scores | to_entries[] | "score \(.key) (\(.value.better // "neither") is better): \(.value.base) -> \(.value.tuned)"),
  (.exports[] | "export \(.name): \(.state)\(if .passed then ", certified" else "" end)   \(.folder)"),
  (.error.problems[]? | "error at \(.where // "?"): \(.what)"),
  (.reports | to_entries[] | select(.value) | "report \(.key): \(.value)")
' result.json
exit "$code"
