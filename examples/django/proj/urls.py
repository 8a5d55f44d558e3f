from django.urls import path
from shop import views

urlpatterns = [
    path("checkout", views.checkout),
    path("orders/<int:number>", views.order),
    path("orders/<int:number>/now", views.order_now),
    path("orders/<int:number>/price", views.price),
]
