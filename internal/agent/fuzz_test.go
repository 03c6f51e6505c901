package agent

import (
	"encoding/json"
	"log/slog"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
)

// FuzzTable: any table can be taken, after any other, and asked; what it has no entry for is the app's.
func FuzzTable(f *testing.F) {
	f.Add([]byte(`{"items":[{"intercept":"in-1","protocol":"TCP","containerPort":8080}]}`), []byte(`{"away":["in-1"],"egress":["in-2"],"shown":[{"intercept":"in-1","container":"app"}]}`))
	f.Add([]byte(`{"items":[{"intercept":"in-1","protocol":"TCP","containerPort":8080,"match":{"headers":[{"name":"x-id","text":{"op":"equal","value":"lou"}}]}},{"intercept":"in-1","protocol":"TCP","containerPort":8080},{"intercept":"t","protocol":"TCP","containerPort":8080,"wiretap":true}]}`), []byte(`{"items":[{}]}`))
	f.Add([]byte(`null`), []byte(`{"items":null}`))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		var all table
		all.init()
		for _, text := range [][]byte{first, second} {
			var m control.Table
			if json.Unmarshal(text, &m) != nil {
				return
			}
			all.set(m, slog.New(slog.DiscardHandler))
			takers := map[string]bool{"": true}
			for _, i := range m.Items {
				takers[i.Intercept] = true
			}
			for _, i := range append(m.Items, control.TableEntry{Protocol: "TCP", ContainerPort: 1}) {
				got := all.lookup(i.Protocol, i.ContainerPort)
				_ = got.byRequest()
				if x := got.explain(&control.Request{Verb: "GET", Target: "/"}); !takers[x.Taker] && x.Taker != "app" {
					t.Errorf("%s: %q gets it", text, x.Taker)
				}
			}
			for _, e := range append(m.Egress, "") {
				_ = all.connects(e)
			}
		}
	})
}
