# Completions of ekiben(1) for fish.

# the first column of a table, below its head in capital letters; what is no row is indented, or ends in a colon
function __ekiben_names
    $argv 2>/dev/null | awk '/^[A-Z]/ { rows = 1; next } rows && /^[^ ]/ && $1 !~ /:$/ { print $1 }'
end

# whether the words before this one begin with these
function __ekiben_after
    set -l words (commandline -opc)[2..]
    test "$words[1..$(count $argv)]" = "$argv"
end

function __ekiben_first
    test (count (commandline -opc)) = 1
end

complete -c ekiben -f
complete -c ekiben -n __ekiben_first -a "trigger hold resume rollback status log check forget-releases fleet"
complete -c ekiben -n __ekiben_first -l config -r -F
complete -c ekiben -n __ekiben_first -l help
complete -c ekiben -n __ekiben_first -l version
complete -c ekiben -n "__ekiben_after trigger" -l wait
complete -c ekiben -n "__ekiben_after status" -l json
complete -c ekiben -n "__ekiben_after hold" -l reason -x
complete -c ekiben -n "__ekiben_after log" -l follow
for command in trigger hold resume rollback status log forget-releases
    complete -c ekiben -n "__ekiben_after $command" -a "(__ekiben_names ekiben status)"
end
complete -c ekiben -n "__ekiben_after check" -F
complete -c ekiben -n "__ekiben_after fleet; and test (count (commandline -opc)) = 2" \
    -a "init build deploy hold resume abort renew status history log diff flake-update bootstrap collect"
complete -c ekiben -n "__ekiben_after fleet" -l repository -r -F
complete -c ekiben -n "__ekiben_after fleet" -l directory -r -F
complete -c ekiben -n "__ekiben_after fleet build" -a "dry-build build test switch"
complete -c ekiben -n "__ekiben_after fleet build" -l target -x
complete -c ekiben -n "__ekiben_after fleet deploy" -l waves
complete -c ekiben -n "__ekiben_after fleet deploy" -l again -x
complete -c ekiben -n "__ekiben_after fleet hold" -l for -x
complete -c ekiben -n "__ekiben_after fleet hold" -l reason -x
complete -c ekiben -n "__ekiben_after fleet abort" -l unsigned
complete -c ekiben -n "__ekiben_after fleet deploy" -l no-build
complete -c ekiben -n "__ekiben_after fleet deploy" -l json
complete -c ekiben -n "__ekiben_after fleet deploy" -l unsigned
for command in build deploy renew
    complete -c ekiben -n "__ekiben_after fleet $command" -l jobs -x
end
for command in status history
    complete -c ekiben -n "__ekiben_after fleet $command" -l json
end
complete -c ekiben -n "__ekiben_after fleet status" -l html -r
complete -c ekiben -n "__ekiben_after fleet collect" -l html -r
complete -c ekiben -n "__ekiben_after fleet collect" -l metrics -r
complete -c ekiben -n "__ekiben_after fleet status" -l wide
complete -c ekiben -n "__ekiben_after fleet status" -l once
for command in build deploy hold resume renew status history log diff flake-update
    complete -c ekiben -n "__ekiben_after fleet $command" -a "(__ekiben_names ekiben fleet status --once)"
end
