package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// process is one of the lab's processes: what it is, where, and what it has used.
type process struct {
	pid      int
	kind     string
	place    string  // the node or laptop
	cpu      float64 // seconds
	rss, top float64 // bytes: now, and at most since resetPeaks
}

// ticks are what /proc counts CPU time in, a second (proc_pid_stat(5); USER_HZ is 100 on every architecture of Go).
const ticks = 100

// processes are those of a lab: all below the holders of its nodes and laptops.
func processes(lab string) ([]process, error) {
	holders, err := holders(lab)
	if err != nil {
		return nil, err
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	parent := map[int]int{}
	used := map[int]float64{}
	for _, f := range stats {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			continue
		}
		fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
		parent[pid], _ = strconv.Atoi(string(fields[1]))
		user, _ := strconv.ParseFloat(string(fields[11]), 64)
		system, _ := strconv.ParseFloat(string(fields[12]), 64)
		used[pid] = (user + system) / ticks
	}
	var out []process
	for pid := range parent {
		for up := parent[pid]; up > 1; up = parent[up] {
			place, ok := holders[up]
			if !ok {
				continue
			}
			p := process{pid: pid, kind: kindOf(pid), place: place, cpu: used[pid]}
			p.rss, p.top = memory(pid)
			out = append(out, p)
			break
		}
	}
	return out, nil
}

// holders are the processes below which all others of each node and laptop are.
func holders(lab string) (map[int]string, error) {
	type held struct{ PID int }
	var state struct {
		Nodes   map[string]held
		Laptops map[string]struct{ Holder held }
	}
	text, err := os.ReadFile("/var/lib/doppel-lab/" + lab + "/lab.json")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &state); err != nil {
		return nil, err
	}
	out := map[int]string{}
	for n, h := range state.Nodes {
		out[h.PID] = n
	}
	for n, l := range state.Laptops {
		out[l.Holder.PID] = n
	}
	return out, nil
}

// kindOf says what a process is, by its command line.
func kindOf(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
	name := filepath.Base(args[0])
	switch {
	case len(args) > 1 && (name == "kube" || name == "bench"):
		return strings.TrimSpace(strings.TrimPrefix(name, "kube") + " " + args[1])
	case name == "doppel" && len(args) > 1 && args[1] == "daemon":
		return "user daemon"
	case name == "doppel-rootd":
		return "root daemon"
	}
	return name
}

// memory is what of a process is in memory, and was at most.
func memory(pid int) (rss, top float64) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseFloat(f[1], 64)
		switch f[0] {
		case "VmRSS:":
			rss = kib * 1024
		case "VmHWM:":
			top = kib * 1024
		}
	}
	return rss, top
}

// resetPeaks has what processes had in memory at most counted from now on (proc(5), clear_refs).
func resetPeaks(ps []process) {
	for _, p := range ps {
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.pid), []byte("5"), 0) // one that has ended does not matter
	}
}

// spent is the CPU time by kind of process between two looks; a laptop's processes count only if they are the one's that is named.
func spent(before, after []process, laptop string) map[string]float64 {
	was := map[int]float64{}
	for _, p := range before {
		was[p.pid] = p.cpu
	}
	out := map[string]float64{}
	for _, p := range after {
		if d := p.cpu - was[p.pid]; d > 0 && (strings.HasPrefix(p.place, "node") || p.place == laptop) {
			out[p.kind] += d
		}
	}
	return out
}
