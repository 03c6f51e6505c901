package kube

import (
	"context"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// client-go's clientset would bring every group of Kubernetes into the programs: twice their size and memory, and three times as long to start.

// resource is a type of objects in the API: where they are, what one is and what a list.
type resource[T, L any] struct {
	group schema.GroupVersion
	name  string
}

var (
	configMaps = resource[corev1.ConfigMap, corev1.ConfigMapList]{corev1.SchemeGroupVersion, "configmaps"}
	namespaces = resource[corev1.Namespace, corev1.NamespaceList]{corev1.SchemeGroupVersion, "namespaces"}
	nodes      = resource[corev1.Node, corev1.NodeList]{corev1.SchemeGroupVersion, "nodes"}
	pods       = resource[corev1.Pod, corev1.PodList]{corev1.SchemeGroupVersion, "pods"}
	services   = resource[corev1.Service, corev1.ServiceList]{corev1.SchemeGroupVersion, "services"}

	daemonSets   = resource[appsv1.DaemonSet, appsv1.DaemonSetList]{appsv1.SchemeGroupVersion, "daemonsets"}
	deployments  = resource[appsv1.Deployment, appsv1.DeploymentList]{appsv1.SchemeGroupVersion, "deployments"}
	replicaSets  = resource[appsv1.ReplicaSet, appsv1.ReplicaSetList]{appsv1.SchemeGroupVersion, "replicasets"}
	statefulSets = resource[appsv1.StatefulSet, appsv1.StatefulSetList]{appsv1.SchemeGroupVersion, "statefulsets"}

	cronJobs = resource[batchv1.CronJob, batchv1.CronJobList]{batchv1.SchemeGroupVersion, "cronjobs"}
	jobs     = resource[batchv1.Job, batchv1.JobList]{batchv1.SchemeGroupVersion, "jobs"}

	ingresses    = resource[networkingv1.Ingress, networkingv1.IngressList]{networkingv1.SchemeGroupVersion, "ingresses"}
	serviceCIDRs = resource[networkingv1.ServiceCIDR, networkingv1.ServiceCIDRList]{networkingv1.SchemeGroupVersion, "servicecidrs"}

	accessReviews = resource[authorizationv1.SelfSubjectAccessReview, struct{}]{authorizationv1.SchemeGroupVersion, "selfsubjectaccessreviews"}
	selfReviews   = resource[authenticationv1.SelfSubjectReview, struct{}]{authenticationv1.SchemeGroupVersion, "selfsubjectreviews"}

	intercepts = resource[v1alpha1.Intercept, v1alpha1.InterceptList]{v1alpha1.GroupVersion, "intercepts"}
	sessions   = resource[v1alpha1.Session, v1alpha1.SessionList]{v1alpha1.GroupVersion, "sessions"}
)

// newREST makes a client for all of these.
func newREST(cfg *rest.Config) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme, networkingv1.AddToScheme, authorizationv1.AddToScheme, authenticationv1.AddToScheme, v1alpha1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	cfg = rest.CopyConfig(cfg)
	cfg.GroupVersion = &corev1.SchemeGroupVersion // of what belongs to no group: options, errors
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	return rest.UnversionedRESTClientFor(cfg)
}

// at leads a request to the objects of a namespace, or of all for "".
func (r resource[T, L]) at(req *rest.Request, ns string) *rest.Request {
	prefix := "/apis/" + r.group.String()
	if r.group.Group == "" {
		prefix = "/api/" + r.group.Version
	}
	return req.AbsPath(prefix).NamespaceIfScoped(ns, ns != "").Resource(r.name)
}

func (r resource[T, L]) get(ctx context.Context, c *Cluster, ns, name string) (*T, error) {
	out := new(T)
	return out, into(r.at(c.api.Get(), ns).Name(name).Do(ctx), out)
}

// list is never nil. An empty selector is all.
func (r resource[T, L]) list(ctx context.Context, c *Cluster, ns, selector string) (*L, error) {
	out, req := new(L), r.at(c.api.Get(), ns)
	if selector != "" {
		req = req.Param("labelSelector", selector)
	}
	return out, into(req.Do(ctx), out)
}

// create takes parameters in pairs of name and value.
func (r resource[T, L]) create(ctx context.Context, c *Cluster, ns string, o *T, params ...string) (*T, error) {
	req := r.at(c.api.Post(), ns).Body(o)
	for i := 0; i < len(params); i += 2 {
		req = req.Param(params[i], params[i+1])
	}
	out := new(T)
	return out, into(req.Do(ctx), out)
}

// patch merges (RFC 7396).
func (r resource[T, L]) patch(ctx context.Context, c *Cluster, ns, name, patch string) error {
	return r.at(c.api.Patch(types.MergePatchType), ns).Name(name).Body([]byte(patch)).Do(ctx).Error()
}

// remove deletes the object of that UID, and no other of its name.
func (r resource[T, L]) remove(ctx context.Context, c *Cluster, ns, name string, uid types.UID) error {
	o := &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}
	return r.at(c.api.Delete(), ns).Name(name).Body(o).Do(ctx).Error()
}

func into(result rest.Result, out any) error {
	return result.Into(out.(runtime.Object))
}
