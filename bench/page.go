package main

import (
	"cmp"
	"fmt"
	"math"
	"strings"
)

const intro = `# Performance

<!-- Written by make bench from docs/performance/*.json; edit bench/page.go. -->

What doppel's data path carries, beside the other ways to the same pod on the same machine at the same time. Anybody with a Linux machine and root
can repeat it:

| command | measures | takes |
|---|---|---|
| ` + "`make bench`" + ` | what is below but for the last two sections | 20 minutes |
| ` + "`make bench-wan`" + ` | the main part through a line with delay and loss | 45 minutes |
| ` + "`make bench-scale`" + ` | a cluster of 5,000 namespaces and 10,000 services; 10,000 connections | 10 minutes |

` + "`bin/bench run -only REGEXP -rounds N`" + ` measures a part. Figures are added to the file until it has N rounds, so a run that was interrupted goes on.

## Method

All runs on a lab ([lab/README.md](../lab/README.md)): a real Kubernetes and laptops, each in network namespaces of its own, on one machine. Client,
kernel, both daemons, API server, traffic-manager, agent and server share its cores: a figure says what a whole way costs, and not what
one of its ends could do on a machine of its own. Each variant has a laptop of its own, all are connected all the time, and within each
kind of work the variants take turns, in an order by lot. A measurement begins when the machine has come to rest: what the one before has left on its way
is gone by then (after 3 s it begins all the same). So noise of the machine hits all of them, and **ratios say more than
figures**; a ratio is the median of the ratios of the rounds, a figure the median of the figures.

| variant | way |
|---|---|
| direct | from the node to the pod's address: no laptop, no tunnel |
| direct, TLS | the same inside TLS 1.3 |
| raw stream | from a laptop by an upgraded request through the API server's service proxy, with nothing inside but the bytes: what doppel's way can carry at most. Each connection is such a stream |
| kubectl port-forward | one kubectl for all |
| doppel, service proxy | as most will use it |
| doppel, port-forward | doppel where the API server does not reach pods |
| doppel, direct | doppel past the API server, by a node port (chart value ` + "`direct.service`" + `; off by default) |

`

func page(all map[string]*figures) string {
	f := all["lan"]
	var b strings.Builder
	b.WriteString(intro)
	m := f.Machine
	last := f.Rounds[len(f.Rounds)-1]
	fmt.Fprintf(&b, "Machine: %s, %s cores, %s of memory, Linux %s (TCP's congestion control: %s), %s. %d rounds, the last at %s with commit %s. Load when the rounds began: %s.\n\n",
		m["cpu"], m["cores"], m["memory"], m["kernel"], cmp.Or(m["congestion control"], "not noted"), m["go"], len(f.Rounds), last.Began.Format("2006-01-02 15:04"), last.Commit, loads(f))
	b.WriteString("## Goals\n\nWhat was wanted before anything was built, and what was measured.\n\n| work | goal | measured | |\n|---|---|---|---|\n")
	for _, g := range goals {
		if measured, met := g.check(all); measured != "" && !strings.Contains(measured, "NaN") {
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", g.work, g.goal, measured, map[bool]string{true: "met", false: "**missed**"}[met])
		}
	}
	b.WriteString("\n## TCP\n\nGbit/s; in brackets the ratio to the raw stream.\n\n![TCP, one flow](performance/tcp.svg)\n\n")
	f.table(&b, f.works("TCP", "", "gbit/s"), "", f.one("", "gbit/s", "raw stream"))
	b.WriteString("CPU seconds for a gigabyte, by process (those under 0.05 left out). Work of the kernel for a process counts as its own where the kernel does so.\n\n")
	f.cpuPer(&b, "TCP up, 1", "bytes", 1e9, 1, .05)
	f.cpuPer(&b, "TCP down, 1", "bytes", 1e9, 1, .05)
	b.WriteString("## HTTP and new connections\n\nRequests a second; median and 99th percentile. A new connection is made, used for one byte to and fro, and closed.\n\n![HTTP, 8 connections](performance/http.svg)\n\n")
	works := append(f.works("HTTP", "", "/s"), f.works("new", "", "/s")...)
	f.table(&b, append(works, f.works("echo", "", "/s")...), "", f.timesOf(""))
	b.WriteString("CPU time by process, microseconds for a request and for a connection (those under 5 left out; without the client). Both cores are busy: a rate is what this leaves.\n\n")
	f.cpuPer(&b, "HTTP, 8", "done", 1, 1e6, 5)
	f.cpuPer(&b, "new connections, 8", "done", 1, 1e6, 5)
	b.WriteString("The connection alone, ms:\n\n")
	f.table(&b, f.works("new", "", "connect p50 ms"), "", f.one("", "connect p50 ms", "direct"))
	b.WriteString("## UDP\n\nDatagrams of 200 bytes that came back, a second, with 64 of them on the way; and loss, in percent, of 2,000 a second.\n\n")
	f.table(&b, f.works("UDP, 64", "", "/s"), "", f.one("", "/s", "direct"))
	f.table(&b, f.works("UDP", "", "loss %"), "", f.one("", "loss %", "none"))
	b.WriteString("## DNS\n\nLookups one after the other: a name of the cluster asked again, names that are new each time, and names outside (\"direct\" is a laptop without doppel that asks the same resolver).\n\n")
	f.table(&b, f.works("DNS", "", "/s"), "", f.timesOf(""))
	b.WriteString("## Inwards\n\nA client on the node asks a service. \"bare proxy\" is a Go program in the agent's place that copies and does nothing else.\n\n![HTTP inwards, 8 connections](performance/inwards.svg)\n\n")
	f.table(&b, f.works("inwards", "", "p50 ms"), "", f.timesOf(""))
	b.WriteString("Gbit/s; in brackets the ratio to no agent.\n\n")
	f.table(&b, f.works("inwards", "", "gbit/s"), "", f.one("", "gbit/s", "no agent"))
	f.memory(&b)
	f.starts(&b)
	if w := all["wan"]; w != nil {
		w.wan(&b)
	}
	if s := all["scale"]; s != nil {
		s.scale(&b)
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func loads(f *figures) string {
	var out []string
	for _, r := range f.Rounds {
		first, _, _ := strings.Cut(r.Load, " ")
		out = append(out, first)
	}
	return strings.Join(out, ", ")
}

func (f *figures) memory(b *strings.Builder) {
	fmt.Fprintf(b, "## Memory\n\nResident, MB. \"idle\" is connected, %s after the work of the round before; \"peak\" the most during one flow up or down. An idle flow was used once and has been silent for %s, too (KiB, the growth with %d of them).\n\n", silence, silence, flows)
	b.WriteString("| | idle | peak, TCP up, 1 | peak, TCP down, 1 | an idle flow, KiB |\n|---|---|---|---|---|\n")
	for _, k := range []string{"user daemon", "root daemon", "manager", "agent"} {
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s |\n", k,
			number(f.median("memory", doppelProxy, "", k+" MB")),
			number(f.median("TCP up, 1", doppelProxy, "", k+" peak MB")),
			number(f.median("TCP down, 1", doppelProxy, "", k+" peak MB")),
			number(f.median("memory", doppelProxy, "", k+" KiB/flow")))
	}
	b.WriteString("\n")
}

func (f *figures) starts(b *strings.Builder) {
	b.WriteString("## Connecting and intercepting\n\nSeconds. Cold is without daemons, warm with them. An intercept is counted from the command to the first answer of the laptop that a client in the cluster gets.\n\n| | s |\n|---|---|\n")
	for _, w := range []string{"connect, cold", "connect, warm"} {
		fmt.Fprintf(b, "| %s | %s |\n", w, number(f.median(w, doppelProxy, "", "s")))
	}
	for _, w := range []string{"intercept, agent there", "intercept, no agent"} {
		fmt.Fprintf(b, "| %s: first answer | %s |\n", w, number(f.median(w, doppelProxy, "", "first answer s")))
		fmt.Fprintf(b, "| %s: the command ends | %s |\n", w, number(f.median(w, doppelProxy, "", "ACTIVE s")))
	}
	fmt.Fprintf(b, "| %d connections at once | %s |\n\n", flows, number(f.median("memory", doppelProxy, "", "1000 flows s")))
}

func (f *figures) wan(b *strings.Builder) {
	fmt.Fprintf(b, "## Long and bad lines\n\nA relay in user space carries the laptop's packets with half of the delay and with the loss in each direction. \"direct\" is TCP from the laptop to the node through the same line. Lines change below the connections of doppel and kubectl, which stay and have to adapt; direct and the raw stream make new ones. %d rounds, the last with commit %s.\n\n", len(f.Rounds), f.Rounds[len(f.Rounds)-1].Commit)
	for _, l := range lines {
		if works := f.works("TCP", l.name, "gbit/s"); len(works) > 0 {
			fmt.Fprintf(b, "### %s\n\nMbit/s, with the ratio to direct; then requests a second, median and 99th percentile.\n\n", l.name)
			f.table(b, works, l.name, func(work, variant string) string {
				m := f.median(work, variant, l.name, "gbit/s")
				if math.IsNaN(m) {
					return f.failed(work, variant, l.name)
				}
				s := number(m * 1000)
				if r := paired(f.series(work, variant, l.name, "gbit/s"), f.series(work, "direct", l.name, "gbit/s"), quotient); variant != "direct" {
					s += fmt.Sprintf(" (%.2f)", r)
				}
				return s
			})
			f.table(b, append(f.works("HTTP", l.name, "/s"), f.works("new", l.name, "/s")...), l.name, f.timesOf(l.name))
		}
	}
}

func (f *figures) scale(b *strings.Builder) {
	fmt.Fprintf(b, "## A large cluster\n\n5,000 namespaces, 10,000 services; then 10,000 connections of one laptop. %d rounds with commit %s; load when they began: %s.\n\n| | |\n|---|---|\n",
		len(f.Rounds), f.Rounds[len(f.Rounds)-1].Commit, loads(f))
	for _, w := range []string{"connect, cold", "connect, warm"} {
		fmt.Fprintf(b, "| %s | %s s |\n", w, number(f.median(w, doppelProxy, "", "s")))
	}
	const many = "10000 connections"
	fmt.Fprintf(b, "| 10,000 connections are made | %s s |\n| the first 1,000 of them | %s s |\n", number(f.median(many, doppelProxy, "", "s")), number(f.median(many, doppelProxy, "", "1000 s")))
	for _, k := range []string{"user daemon", "manager"} {
		fmt.Fprintf(b, "| %s with them | %s MB |\n", k, number(f.median(many, doppelProxy, "", k+" MB")))
	}
	b.WriteString("\n")
}
