package chart

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	fakediscovery "k8s.io/client-go/discovery/fake"
	fakedynamic "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
)

// TestNamespaceUsed: a namespace goes with the uninstall only if there is nothing of anybody's in it, of whatever type.
func TestNamespaceUsed(t *testing.T) {
	verbs := metav1.Verbs{"create", "list", "get", "delete"}
	core := fake.NewClientset()
	core.Discovery().(*fakediscovery.FakeDiscovery).Resources = []*metav1.APIResourceList{
		{GroupVersion: "v1", APIResources: []metav1.APIResource{
			{Name: "configmaps", Kind: "ConfigMap", Namespaced: true, Verbs: verbs},
			{Name: "serviceaccounts", Kind: "ServiceAccount", Namespaced: true, Verbs: verbs},
			{Name: "secrets", Kind: "Secret", Namespaced: true, Verbs: verbs},
			{Name: "events", Kind: "Event", Namespaced: true, Verbs: verbs},
			{Name: "bindings", Kind: "Binding", Namespaced: true, Verbs: metav1.Verbs{"create"}},
		}},
		{GroupVersion: "rbac.authorization.k8s.io/v1", APIResources: []metav1.APIResource{{Name: "rolebindings", Kind: "RoleBinding", Namespaced: true, Verbs: verbs}}},
		{GroupVersion: "metrics.k8s.io/v1beta1", APIResources: []metav1.APIResource{{Name: "pods", Kind: "PodMetrics", Namespaced: true, Verbs: metav1.Verbs{"list"}}}},
		{GroupVersion: "acme.example/v1", APIResources: []metav1.APIResource{{Name: "databases", Kind: "Database", Namespaced: true, Verbs: verbs}}},
		{GroupVersion: "doppel.dev/v1alpha1", APIResources: []metav1.APIResource{{Name: "sessions", Kind: "Session", Namespaced: true, Verbs: verbs}}},
	}
	object := func(api, kind, ns, name string) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": api, "kind": kind, "metadata": map[string]any{"namespace": ns, "name": name}}}
	}
	usual := []runtime.Object{
		object("v1", "ConfigMap", "doppel", "kube-root-ca.crt"), object("v1", "ServiceAccount", "doppel", "default"), object("v1", "Event", "doppel", "x"),
		object("doppel.dev/v1alpha1", "Session", "doppel", "s"), object("v1", "ConfigMap", "shop", "theirs"),
	}
	guest := object("rbac.authorization.k8s.io/v1", "RoleBinding", "doppel", "guest")
	guest.Object["roleRef"] = map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "doppel-connect"}
	usual = append(usual, guest, object("v1", "Secret", "doppel", "doppel-relay"))
	ending := object("v1", "ConfigMap", "doppel", "ours")
	ending.SetDeletionTimestamp(&metav1.Time{Time: time.Now()})
	for want, more := range map[string]*unstructured.Unstructured{
		"":                              ending,
		"RoleBinding developers is in":  object("rbac.authorization.k8s.io/v1", "RoleBinding", "doppel", "developers"),
		"Database prod is in":           object("acme.example/v1", "Database", "doppel", "prod"),
		"ConfigMap settings is in":      object("v1", "ConfigMap", "doppel", "settings"),
		"Secret theirs is in":           object("v1", "Secret", "doppel", "theirs"),
		"ServiceAccount operator is in": object("v1", "ServiceAccount", "doppel", "operator"),
	} {
		c := &client{core: core, namespace: "doppel", dynamic: fakedynamic.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
			{Version: "v1", Resource: "configmaps"}: "ConfigMapList", {Version: "v1", Resource: "serviceaccounts"}: "ServiceAccountList", {Version: "v1", Resource: "events"}: "EventList", {Version: "v1", Resource: "secrets"}: "SecretList",
			{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"}: "RoleBindingList", {Group: "acme.example", Version: "v1", Resource: "databases"}: "DatabaseList",
			{Group: "doppel.dev", Version: "v1alpha1", Resource: "sessions"}: "SessionList",
		}, append([]runtime.Object{more}, usual...)...)}
		got, unknown, err := c.namespaceUsed(t.Context())
		if err != nil || unknown != "" || want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("want %q: %q, %v", want, got, err)
		}
	}
}
