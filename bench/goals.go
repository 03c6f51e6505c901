package main

import (
	"fmt"
	"math"
)

const (
	doppelProxy  = "doppel, service proxy"
	doppelDirect = "doppel, direct"
)

// goal is what was wanted. check says what was measured, "" if nothing was.
type goal struct {
	work, goal string
	check      func(all map[string]*figures) (measured string, met bool)
}

// lanGoal is a goal of the plan lan that several figures decide.
func lanGoal(fn func(f *figures) (string, bool)) func(map[string]*figures) (string, bool) {
	return func(all map[string]*figures) (string, bool) { return fn(all["lan"]) }
}

// ratio of a quantity between two variants, and perhaps two works.
func (f *figures) ratio(work, variant, baseWork, base, unit string) float64 {
	return paired(f.series(work, variant, "", unit), f.series(baseWork, base, "", unit), quotient)
}

// more is how much more of a quantity a variant takes than another.
func (f *figures) more(work, variant, baseWork, base, unit string) float64 {
	return paired(f.series(work, variant, "", unit), f.series(baseWork, base, "", unit), difference)
}

var goals = []goal{
	{"TCP, one flow", "≥ 0.8 of the raw stream", lanGoal(func(f *figures) (string, bool) {
		up := f.ratio("TCP up, 1", doppelProxy, "TCP up, 1", "raw stream", "gbit/s")
		down := f.ratio("TCP down, 1", doppelProxy, "TCP down, 1", "raw stream", "gbit/s")
		return fmt.Sprintf("up %.2f, down %.2f", up, down), min(up, down) >= .8
	})},
	{"TCP, 4 flows", "≥ 1.2 of one raw stream", lanGoal(func(f *figures) (string, bool) {
		up := f.ratio("TCP up, 4", doppelProxy, "TCP up, 1", "raw stream", "gbit/s")
		down := f.ratio("TCP down, 4", doppelProxy, "TCP down, 1", "raw stream", "gbit/s")
		return fmt.Sprintf("up %.2f, down %.2f", up, down), min(up, down) >= 1.2
	})},
	{"HTTP, 8 connections", "≥ 2.5 times kubectl port-forward; median ≤ 1.5 ms", lanGoal(func(f *figures) (string, bool) {
		r := f.ratio("HTTP, 8", doppelProxy, "HTTP, 8", "kubectl port-forward", "/s")
		p50 := f.median("HTTP, 8", doppelProxy, "", "p50 ms")
		return fmt.Sprintf("%.2f times, %.2f ms", r, p50), r >= 2.5 && p50 <= 1.5
	})},
	{"HTTP, 1 connection", "median ≤ the raw stream's echo + 0.35 ms", lanGoal(func(f *figures) (string, bool) {
		d := f.more("HTTP, 1", doppelProxy, "echo, idle", "raw stream", "p50 ms")
		return fmt.Sprintf("+ %.2f ms", d), d <= .35
	})},
	{"new connection", "median ≤ the raw stream's echo + 1 ms; ≥ 1,500/s with 8 workers", lanGoal(func(f *figures) (string, bool) {
		d := f.more("new connections, 1", doppelProxy, "echo, idle", "raw stream", "connect p50 ms")
		if math.IsNaN(d) {
			d = paired(f.series("new connections, 1", doppelProxy, "", "connect p50 ms"), f.series("echo, idle", "raw stream", "", "p50 ms"), difference)
		}
		rate := f.median("new connections, 8", doppelProxy, "", "/s")
		return fmt.Sprintf("+ %.2f ms, %s/s", d, number(rate)), d <= 1 && rate >= 1500
	})},
	{"small request while a flow takes all", "median ≤ 5 times idle, p99 ≤ 30 ms", lanGoal(func(f *figures) (string, bool) {
		worst, p99 := 0.0, 0.0
		for _, w := range []string{"HTTP under a download", "HTTP under an upload"} {
			worst = max(worst, f.ratio(w, doppelProxy, "HTTP, 1", doppelProxy, "p50 ms"))
			p99 = max(p99, f.median(w, doppelProxy, "", "p99 ms"))
		}
		return fmt.Sprintf("%.1f times, %.1f ms", worst, p99), worst <= 5 && p99 <= 30
	})},
	{"intercepted HTTP request, cluster to laptop", "median ≤ outbound + 0.3 ms", lanGoal(func(f *figures) (string, bool) {
		all := f.more("inwards: HTTP, 1", "agent, all: laptop", "HTTP, 1", doppelProxy, "p50 ms")
		matched := f.more("inwards: HTTP, 1", "agent, matched: laptop", "HTTP, 1", doppelProxy, "p50 ms")
		return fmt.Sprintf("all: %+.2f ms, matched: %+.2f ms", all, matched), max(all, matched) <= .3
	})},
	{"HTTP passed through by an agent, 8 connections", "≥ 0.95 of a bare proxy", lanGoal(func(f *figures) (string, bool) {
		pass := f.ratio("inwards: HTTP, 8", "agent, passed through", "inwards: HTTP, 8", "bare proxy", "/s")
		idle := f.ratio("inwards: HTTP, 8", "agent, no intercept", "inwards: HTTP, 8", "bare proxy", "/s")
		return fmt.Sprintf("%.2f; without an intercept %.2f", pass, idle), min(pass, idle) >= .95
	})},
	{"bulk through an agent", "≥ 0.9 of no agent", agentBulk("inwards: download")},
	{"bulk through an agent, where the pods' line carries 5 Gbit/s", "≥ 0.9 of no agent", agentBulk(lineDownload)},
	{"memory", "user daemon and manager ≤ 40 MB idle, peak ≤ 2 times; ≤ 12 KiB an idle flow at each end; agent ≤ 15 MB", lanGoal(func(f *figures) (string, bool) {
		m := func(unit string) float64 { return f.median("memory", doppelProxy, "", unit) }
		peak := func(k string) float64 {
			return max(f.median("TCP up, 1", doppelProxy, "", k+" peak MB"), f.median("TCP down, 1", doppelProxy, "", k+" peak MB"))
		}
		user, manager, agent := m("user daemon MB"), m("manager MB"), m("agent MB")
		fu, fm := m("user daemon KiB/flow"), m("manager KiB/flow")
		return fmt.Sprintf("%.0f and %.0f MB, peak %.0f and %.0f; %.1f and %.1f KiB; agent %.0f MB", user, manager, peak("user daemon"), peak("manager"), fu, fm, agent),
			max(user, manager) <= 40 && peak("user daemon") <= 2*user && peak("manager") <= 2*manager && max(fu, fm) <= 12 && agent <= 15
	})},
	{"connect", "≤ 1.5 s cold, ≤ 0.2 s warm", lanGoal(connectGoal)},
	{"connect, 5,000 namespaces and 10,000 services", "≤ 1.5 s cold, ≤ 0.2 s warm", func(all map[string]*figures) (string, bool) {
		if all["scale"] == nil {
			return "", false
		}
		return connectGoal(all["scale"])
	}},
	{"10,000 connections of one laptop", "all open, the first 1,000 in under 1 s", func(all map[string]*figures) (string, bool) {
		f := all["scale"]
		if f == nil {
			return "", false
		}
		first := f.median("10000 connections", doppelProxy, "", "1000 s")
		whole := f.median("10000 connections", doppelProxy, "", "s")
		return fmt.Sprintf("all in %.1f s, 1,000 in %.2f s", whole, first), first < 1
	}},
	{"intercept, agent there", "≤ 0.15 s to the first intercepted answer", lanGoal(func(f *figures) (string, bool) {
		s := f.median("intercept, agent there", doppelProxy, "", "first answer s")
		return fmt.Sprintf("%.2f s", s), s <= .15
	})},
	{"80 ms", "a connection in 1 round trip; one flow ≥ 200 Mbit/s", func(all map[string]*figures) (string, bool) {
		f := all["wan"]
		if f == nil {
			return "", false
		}
		connect := f.median("new connections, 1", doppelProxy, "80 ms", "connect p50 ms")
		up, down := f.median("TCP up, 1", doppelProxy, "80 ms", "gbit/s")*1000, f.median("TCP down, 1", doppelProxy, "80 ms", "gbit/s")*1000
		return fmt.Sprintf("%.0f ms; up %.0f, down %.0f Mbit/s", connect, up, down), connect <= 85 && min(up, down) >= 200
	}},
	{"80 ms, 1 % loss: 64 connections' small requests", "p99 ≤ 1.5 times direct TCP's", func(all map[string]*figures) (string, bool) {
		f := all["wan"]
		if f == nil {
			return "", false
		}
		r := paired(f.series("HTTP, 64", doppelProxy, "80 ms, 1 %", "p99 ms"), f.series("HTTP, 64", "direct", "80 ms, 1 %", "p99 ms"), quotient)
		return fmt.Sprintf("%.2f times", r), r <= 1.5
	}},
	{"doppel, direct: TCP, one flow", "≥ 0.5 of TCP with TLS", lanGoal(func(f *figures) (string, bool) {
		up := f.ratio("TCP up, 1", doppelDirect, "TCP up, 1", "direct, TLS", "gbit/s")
		down := f.ratio("TCP down, 1", doppelDirect, "TCP down, 1", "direct, TLS", "gbit/s")
		if math.IsNaN(up) {
			return "", false
		}
		return fmt.Sprintf("up %.2f, down %.2f", up, down), min(up, down) >= .5
	})},
}

func agentBulk(work string) func(map[string]*figures) (string, bool) {
	return lanGoal(func(f *figures) (string, bool) {
		idle := f.ratio(work, "agent, no intercept", work, "no agent", "gbit/s")
		if math.IsNaN(idle) {
			return "", false
		}
		pass := f.ratio(work, "agent, passed through", work, "no agent", "gbit/s")
		bare := f.ratio(work, "bare proxy", work, "no agent", "gbit/s")
		return fmt.Sprintf("%.2f without an intercept, %.2f with one of others; a bare proxy %.2f", idle, pass, bare), min(idle, pass) >= .9
	})
}

func connectGoal(f *figures) (string, bool) {
	cold, warm := f.median("connect, cold", doppelProxy, "", "s"), f.median("connect, warm", doppelProxy, "", "s")
	return fmt.Sprintf("%.2f s, %.2f s", cold, warm), cold <= 1.5 && warm <= .2
}
