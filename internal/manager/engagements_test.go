package manager

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/doppel-dev/doppel/internal/control"
)

func TestEngagements(t *testing.T) {
	e := newEngagements()
	var told []string
	e.onChange(func(w workloadKey) {
		if _, ok := e.get("deadlock?"); ok { // called without a lock held
			t.Error("unexpected engagement")
		}
		told = append(told, w.Name)
	})
	web, db := workloadKey{"shop", "Deployment", "web"}, workloadKey{"data", "Deployment", "db"}
	a := engagement{UID: "a", Session: "s", Workload: web, Protocol: "TCP", Port: 80}
	b := engagement{UID: "b", Session: "s", Workload: web, Protocol: "TCP", Port: 81}
	e.set(b)
	e.set(a)
	e.set(a) // the same again changes nothing
	e.set(engagement{UID: "c", Workload: db, Protocol: "TCP", Port: 5432})
	if d := cmp.Diff([]string{"web", "web", "db"}, told); d != "" {
		t.Errorf("told:\n%s", d)
	}
	if d := cmp.Diff([]engagement{a, b}, e.of(web)); d != "" {
		t.Errorf("of web:\n%s", d)
	}
	want := control.Table{Generation: 3, Items: []control.TableEntry{{Intercept: "a", Protocol: "TCP", ContainerPort: 80}, {Intercept: "b", Protocol: "TCP", ContainerPort: 81}}}
	if d := cmp.Diff(want, e.table(web)); d != "" {
		t.Errorf("table:\n%s", d)
	}
	if got := e.table(workloadKey{}); got.Items == nil || len(got.Items) != 0 {
		t.Errorf("an unknown workload's table is %v, want empty and not null", got.Items)
	}
	if !e.inNamespace("data") || e.inNamespace("other") {
		t.Error("inNamespace")
	}
	if g, ok := e.remove("c"); !ok || g.Workload != db || e.inNamespace("data") {
		t.Error("remove")
	}
	told = nil
	if _, ok := e.remove("c"); ok || told != nil {
		t.Error("removing what is not there told somebody")
	}
}
