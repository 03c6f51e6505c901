package relayapi

import (
	"strings"
	"testing"
)

func TestWish(t *testing.T) {
	good := Wish{Connection: "prod", Namespace: "shop", Workload: "deployment/web", Port: "http", Local: 3000, Header: "x-user", Value: "ann"}
	if err := good.Check(); err != nil || good.Name() != "web" {
		t.Error(err, good.Name())
	}
	if got := good.String(); got != "port http of deployment/web in shop of prod, to port 3000 of the laptop, requests with x-user: ann" {
		t.Error(got)
	}
	if err := (Wish{Connection: "prod", Namespace: "shop", Workload: "web", Local: 1}).Check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Wish){
		"no connection":          func(w *Wish) { w.Connection = "" },
		"a path as namespace":    func(w *Wish) { w.Namespace = "../kube-system" },
		"a path as workload":     func(w *Wish) { w.Workload = "deployment/../secrets" },
		"two kinds":              func(w *Wish) { w.Workload = "a/b/c" },
		"a flag as workload":     func(w *Wish) { w.Workload = "--mount=/" },
		"a UDP port":             func(w *Wish) { w.Port = "53/udp" },
		"a port behind a port":   func(w *Wish) { w.Port = "80:22" },
		"no local port":          func(w *Wish) { w.Local = 0 },
		"a value without a name": func(w *Wish) { w.Header = "" },
		"two headers":            func(w *Wish) { w.Header = "a: b\r\nc" },
		"a value of two lines":   func(w *Wish) { w.Value = "a\r\nc: d" },
		"a long value":           func(w *Wish) { w.Value = strings.Repeat("x", 1025) },
	} {
		w := good
		change(&w)
		if w.Check() == nil {
			t.Errorf("%s: %+v", name, w)
		}
	}
}
