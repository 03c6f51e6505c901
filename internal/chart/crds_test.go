package chart

import (
	"crypto/sha256"
	"fmt"
	"os"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	fakediscovery "k8s.io/client-go/discovery/fake"
	fakedynamic "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"
)

// TestNewerCRDs: the resource types of a newer doppel stay as they are, others become what the chart says.
func TestNewerCRDs(t *testing.T) {
	ch, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		schema  string // in the cluster
		refused bool   // whoever asks may not read resource types
		applied int
	}{
		"older":          {"0", false, 2},
		"the same":       {"1", false, 2},
		"not numbered":   {"", false, 2},
		"newer":          {"100000", false, 0},
		"not to be read": {"100000", true, 2},
	} {
		t.Run(name, func(t *testing.T) {
			ours, err := crds(ch)
			if err != nil {
				t.Fatal(err)
			}
			var there []runtime.Object
			for _, o := range ours {
				o = o.DeepCopy()
				a := o.GetAnnotations()
				if a[schemaKey] = row.schema; row.schema == "" {
					delete(a, schemaKey)
				}
				o.SetAnnotations(a)
				there = append(there, o)
			}
			core := fake.NewClientset()
			core.Discovery().(*fakediscovery.FakeDiscovery).Resources = []*metav1.APIResourceList{
				{GroupVersion: "doppel.dev/v1alpha1", APIResources: []metav1.APIResource{{Name: "sessions"}, {Name: "intercepts"}}},
			}
			dyn := fakedynamic.NewSimpleDynamicClient(runtime.NewScheme(), there...)
			applied := 0
			dyn.PrependReactor("patch", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
				applied++
				return true, &unstructured.Unstructured{}, nil
			})
			dyn.PrependReactor("get", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
				return row.refused, nil, apierrors.NewForbidden(crdGVR.GroupResource(), "", nil)
			})
			var said []string
			made, err := (&client{core: core, dynamic: dyn}).applyCRDs(t.Context(), ch, func(s string) { said = append(said, s) })
			if err != nil || made || applied != row.applied || len(said) != 2-row.applied {
				t.Errorf("made %v, applied %d, want %d; %q; %v", made, applied, row.applied, said, err)
			}
		})
	}
}

// TestSchemaGrows: who changes a resource type gives it a higher number.
func TestSchemaGrows(t *testing.T) {
	const golden = "testdata/crds.golden.yaml"
	type state struct {
		Schema int    `json:"schema"`
		SHA256 string `json:"sha256"`
	}
	ch, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	list, err := crds(ch)
	if err != nil {
		t.Fatal(err)
	}
	now, was := map[string]state{}, map[string]state{}
	for _, o := range list {
		n := schemaOf(o)
		o.SetAnnotations(nil)
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		now[o.GetName()] = state{n, fmt.Sprintf("%x", sha256.Sum256(text))}
	}
	text, err := os.ReadFile(golden)
	if err == nil {
		err = yaml.UnmarshalStrict(text, &was)
	}
	if err != nil && !*update {
		t.Fatal(err)
	}
	for name, n := range now {
		if w := was[name]; n.SHA256 != w.SHA256 && n.Schema <= w.Schema {
			t.Errorf("%s has changed: raise its %s above %d (api/v1alpha1, charts/doppel/crds)", name, schemaKey, w.Schema)
		} else if n != w && !*update {
			t.Errorf("%s is numbered %d; write %s with -update", name, n.Schema, golden)
		}
	}
	if *update && !t.Failed() {
		if text, err = yaml.Marshal(now); err == nil {
			err = os.WriteFile(golden, text, 0o644)
		}
		if err != nil {
			t.Error(err)
		}
	}
}
